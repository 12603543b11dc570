"""Amounts: what is read, what is refused, and that the text is kept."""

import copy
import json
import math
import pickle

import pytest
from shoestring.recipes import Bytes, Count, Every, Joules, Money, Price, Seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3h", 10800), ("90s", 90), ("1h30m", 5400), ("1h 30min", 5400), ("5min", 300), ("1.5h", 5400),
        ("2d", 172800), ("1:30:00", 5400), ("10 minutes", 600), ("1H", 3600), ("1e3s", 1000), (" 2h ", 7200),
    ],
)  # fmt: skip
def test_seconds(text: str, seconds: float) -> None:
    amount = Seconds.parse(text)
    assert amount == seconds
    assert amount.text == text.strip()


@pytest.mark.parametrize(
    "given",
    ["", "h", "3", "3 apples", "-1h", "1h-", "1h 30", "1:30", "٣h", "nan s", "inf h", 3, 3.5, None, True, []],
)
def test_not_seconds(given: object) -> None:
    with pytest.raises(ValueError, match="is not a duration such as 90s, 5min, 1h30m, 3h or 2d"):
        Seconds.parse(given)


@pytest.mark.parametrize("given", ["0s", "0h0m", "1e400s"])
def test_seconds_without_size(given: str) -> None:
    with pytest.raises(ValueError, match="is not above 0 and finite"):
        Seconds.parse(given)


@pytest.mark.parametrize(
    ("text", "value", "currency"),
    [("20 USD", 20, "USD"), ("$20", 20, "USD"), ("7.5EUR", 7.5, "EUR"), ("GBP 3", 3, "GBP")],
)
def test_money(text: str, value: float, currency: str) -> None:
    assert Money.parse(text) == value
    assert Money.parse(text).currency == currency


@pytest.mark.parametrize("text", ["2.49 USD/h", "$2.49/hour", "USD 2.49 / h", "2.49USD/hr"])
def test_price(text: str) -> None:
    assert Price.parse(text) == 2.49
    assert Price.parse(text).currency == "USD"


@pytest.mark.parametrize("given", ["20", "20 dollars", "USD", "20 usd", 20])
def test_not_money(given: object) -> None:
    with pytest.raises(ValueError, match="is not an amount of money with its currency"):
        Money.parse(given)


@pytest.mark.parametrize("given", ["2.49 USD", "2.49/h", "2.49 USD/day", 2.49])
def test_not_a_price(given: object) -> None:
    with pytest.raises(ValueError, match="is not a price per hour"):
        Price.parse(given)


@pytest.mark.parametrize(
    ("text", "joules"), [("500 Wh", 1.8e6), ("0.5 kWh", 1.8e6), ("2 MJ", 2e6), ("3kJ", 3000), ("7 J", 7)]
)
def test_joules(text: str, joules: float) -> None:
    assert math.isclose(Joules.parse(text), joules)


@pytest.mark.parametrize(
    ("text", "size"), [("16GB", 16 * 10**9), ("16 GiB", 16 * 2**30), ("500 MB", 5 * 10**8), ("1.5 KiB", 1536)]
)
def test_bytes(text: str, size: int) -> None:
    assert Bytes.parse(text) == size
    assert isinstance(Bytes.parse(text), int)


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ("2M", 2_000_000),
        ("1.5e6", 1_500_000),
        (500, 500),
        (1e3, 1000),
        ("20k", 20_000),
        ("1_000", 1000),
        ("0.5B", 5 * 10**8),
    ],
)
def test_count(given: object, count: int) -> None:
    assert Count.parse(given) == count
    assert isinstance(Count.parse(given), int)


@pytest.mark.parametrize("given", [0, -1, 1.5, "1.5", True, "2 X", "many", None, math.inf, math.nan])
def test_not_a_count(given: object) -> None:
    with pytest.raises(ValueError, match="is not a whole number above 0"):
        Count.parse(given)


def test_every() -> None:
    assert Every.parse(500) == Every(steps=500)
    assert Every.parse("10%") == Every(share=0.1)
    assert Every.parse("5min") == Every(seconds=300)
    assert [Every.parse(given).text for given in (500, "12.5%", "5min")] == [500, "12.5%", "5min"]
    assert Every(seconds=300.0).text == "300s"


@pytest.mark.parametrize("given", [0, -5, True, 0.5, "0%", "101%", "soon", "", None, "500", "%"])
def test_not_every(given: object) -> None:
    with pytest.raises(ValueError, match="is not a number of steps such as 500"):
        Every.parse(given)


def test_every_is_exactly_one() -> None:
    for wrong in ({}, {"steps": 1, "share": 0.5}, {"share": 1.5}, {"steps": 0}):
        with pytest.raises(ValueError, match="is not a number of steps"):
            Every(**wrong)


@pytest.mark.parametrize(
    "amount",
    [
        Seconds.parse("1h30m"),
        Money.parse("$2"),
        Price.parse("2 EUR/h"),
        Bytes.parse("2 GiB"),
        Count.parse("2M"),
    ],
)
def test_amounts_keep_text_and_kind(amount: Seconds) -> None:
    for twin in (copy.deepcopy(amount), pickle.loads(pickle.dumps(amount))):
        assert (type(twin), twin, twin.text) == (type(amount), amount, amount.text)
    assert json.loads(json.dumps(amount)) == amount
    assert type(amount).parse(amount) is amount
