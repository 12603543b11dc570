"""One budget over supervised rows and pairs."""

import pytest
from shoestring.plan import choose_split
from shoestring.recipes.errors import UserError

PLENTY = 10**9


def share(rows: int, pairs: int, pair_tokens: int = PLENTY, tokens: float = 1e6) -> float:
    return choose_split(rows, pairs, pair_tokens, tokens, None).share


def test_below_a_thousand_examples_all_of_it_is_for_sft() -> None:
    assert share(500, 499) == 1.0
    assert "999 examples, fewer than 1,000" in choose_split(500, 499, PLENTY, 1e6, None).reason
    assert share(100_000, 0) == 1.0


def test_above_preferences_get_a_growing_share_and_sft_never_less_than_a_tenth() -> None:
    found = [share(n // 2, n // 2) for n in (1000, 1250, 2000, 5000, 10_000, 10**6)]
    assert found == [1.0, 0.8, 0.5, 0.2, 0.1, 0.1]


def test_examples_that_the_budget_never_sees_do_not_count() -> None:
    few = choose_split(7000, 600, 300_000, 40_000, None, sft_tokens=1_220_000)
    assert few.share == 1.0
    assert "the budget sees about 200 of 7,600 examples, fewer than 1,000" in few.reason
    some = choose_split(7000, 600, 300_000, 400_000, None, sft_tokens=1_220_000)
    assert some.share == pytest.approx(0.5)
    assert choose_split(7000, 600, 300_000, 1.6e6, None, sft_tokens=1_220_000).share < 0.65


def test_pairs_are_not_repeated_more_than_twice() -> None:
    found = choose_split(5000, 5000, 100_000, 1e6, None)
    assert found.share == pytest.approx(0.8)
    assert "2 passes over the 5,000 pairs" in found.reason
    assert share(5000, 5000, pair_tokens=450_000) == pytest.approx(0.1)
    assert share(5000, 5000, pair_tokens=449_000) > 0.1


def test_a_given_share_is_taken_with_a_word_where_it_is_against_the_findings() -> None:
    fine = choose_split(5000, 5000, PLENTY, 1e6, 0.3)
    assert (fine.share, fine.reason, fine.warning) == (0.3, "objective.split=0.3", None)
    assert "below 1,000" in (choose_split(400, 400, PLENTY, 1e6, 0.5).warning or "")
    assert "above 1,000" in (choose_split(5000, 5000, PLENTY, 1e6, 1.0).warning or "")
    assert "pairs 9.0 times" in (choose_split(5000, 5000, 100_000, 1e6, 0.1).warning or "")
    assert choose_split(400, 400, PLENTY, 1e6, 1.0).warning is None


@pytest.mark.parametrize("given", [0.0, -0.1, 1.5])
def test_no_sft_at_all_is_refused(given: float) -> None:
    with pytest.raises(UserError) as caught:
        choose_split(5000, 5000, PLENTY, 1e6, given)
    text = str(caught.value)
    assert text.startswith(f"objective.split  {given:g} was given; allowed: above 0, at most 1")
    assert "objective.split=auto" in text
    assert ("finds no start" in text) == (given == 0.0)
