"""Every key of the config, so that a new or a lost one is a decision that somebody sees."""

from pathlib import Path

from run import sections
from utils.schema import keys_of

SNAPSHOT = Path(__file__).with_name("config_keys.txt")
REMEDY = (
    "if the change is meant, write the list anew: "
    'PYTHONPATH=.:tests python -c "import test_config_keys as t; t.SNAPSHOT.write_text(t.known_keys())"'
)


def known_keys() -> str:
    """All dotted keys, sorted, one per line; those of all formats, methods and systems."""
    return "\n".join(sorted(set(keys_of(sections())))) + "\n"


def test_keys_are_those_of_the_snapshot() -> None:
    known, listed = known_keys().split(), SNAPSHOT.read_text().split()
    new, lost = sorted(set(known) - set(listed)), sorted(set(listed) - set(known))
    assert not new, f"keys that {SNAPSHOT.name} does not list: {', '.join(new)}; {REMEDY}"
    assert not lost, f"keys that only {SNAPSHOT.name} knows: {', '.join(lost)}; {REMEDY}"
    assert known == listed, f"{SNAPSHOT.name} is not sorted; {REMEDY}"


def test_the_snapshot_reaches_every_depth() -> None:
    listed = SNAPSHOT.read_text().split()
    for key in ("dataset", "model.sdf.hash_grid.num_levels", "system.loss.eikonal", "trainer.optimizer.grid"):
        assert key in listed
