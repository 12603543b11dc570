"""The examples of docs/optimizers.md do what the page says."""

from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "optimizers.md"


def test_the_examples_run(capsys, caplog):
    blocks = [part.split("```")[0] for part in PAGE.read_text(encoding="utf-8").split("```python\n")[1:]]
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert capsys.readouterr().out == "True\n"
    assert [record.getMessage() for record in caplog.records] == [
        "APOLLO: AdamW takes 0.bias (128,), 2.bias (64,)"
    ]
    kinds = [group["kind"] for group in names["optimizer"].param_groups]  # type: ignore[attr-defined]
    assert kinds == ["matrix", "adamw"]


def test_every_optimizer_is_on_the_page():
    from shoestring.optimizers.rates import RATE_OVER_ADAMW

    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in RATE_OVER_ADAMW if f"`{name}`" not in text] == []
