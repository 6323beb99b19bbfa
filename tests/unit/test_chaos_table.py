import dataclasses
import json

import pytest
from chaos.soaked import Soaked
from chaos.table import HEAD, Fault, Found, Line, check_complete, markdown, newest, repeated

GOOD = Found(detected_s=0.04, cause="rank 1 died | badly", again_s=9.97, steps_lost=0, exit_code=0)


def line(found=GOOD):
    return Line(number=1, fault="rank killed", mode="local", found=found)


def test_a_line_has_the_columns_of_the_page():
    page = markdown([line()], {"date": "2026-01-01"}, "# Faults")
    assert "| number | fault | mode | detected after | cause named | training again after | steps lost |" in page
    assert "| 1 | rank killed | local | 0.0 s | rank 1 died / badly | 10.0 s | 0 | 0 | 0 | passed |" in page
    assert "- passed: 1 of 1 rows\n- not run: 1 hosts, 2 local, 2 hosts, " in page
    assert "- date: 2026-01-01" in page
    assert all(row.count("|") == len(HEAD) + 1 for row in page.splitlines() if row.startswith("|"))


@pytest.mark.parametrize(
    ("found", "why"),
    [(Found(wrong=("a", "b")), "a; b"), (Found(orphans=1), "1 processes or sockets left")],
)
def test_what_is_wrong_or_left_fails_a_row_and_is_told(found, why):
    page = markdown([line(), line(found)], {}, "# Faults")
    assert page.count("| passed |") == page.count("| failed |") == 1
    assert f"- 1 local: {why}" in page


def test_series_of_rows_are_put_together():
    later = dataclasses.replace(line(), found=Found(wrong=("worse",)))
    other = dataclasses.replace(line(), mode="hosts")
    kept = [json.loads(json.dumps(dataclasses.asdict(one))) for one in (other, line(), later)]
    assert newest(kept) == [later, other]
    assert list(repeated(kept).values()) == ["1 local 2 times, 1 failed"]
    assert repeated(kept[:2]) == {}


def test_the_catalogue_has_every_row_once():
    faults = [Fault(number=n, name="", local=lambda _: GOOD, hosts=lambda _: GOOD) for n in range(1, 34)]
    check_complete(faults)
    with pytest.raises(ValueError, match="1 to 33"):
        check_complete(faults[1:])


SOAKED = Soaked(
    asked_s=360.0,
    took_s=400.0,
    faults=2,
    attempts=3,
    steps_lost=0,
    exit_codes=(0, 0),
    left=0,
    losses=(1.0, 1.0),
    same_weights=True,
    alarm="",
    load=1.0,
    goodput=0.5,
)


def test_a_soak_passes_where_nothing_is_wrong():
    assert SOAKED.wrong() == []
    assert SOAKED.told().endswith("goodput 0.5: passed")


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"exit_codes": (0, 1)}, "exit codes 0 and 1"),
        ({"left": 1}, "1 processes or sockets left"),
        ({"alarm": "node2: gone"}, "a false alarm in the undisturbed run: node2: gone"),
        ({"faults": 0, "attempts": 1}, "0 faults only, not 1"),
        ({"attempts": 4}, "4 attempts with 2 faults"),
        ({"steps_lost": 1}, "1 steps lost where a survivor had them"),
        ({"losses": (1.006, 1.0)}, "final losses differ by 0.600%"),
        ({"losses": (float("nan"), 1.0)}, "final losses differ by nan%"),
        ({"same_weights": False}, "other weights than those of the undisturbed run"),
    ],
)
def test_a_soak_fails_for_each_thing_that_is_wrong(values, why):
    soaked = dataclasses.replace(SOAKED, **values)
    assert soaked.wrong() == [why]
    assert soaked.told().endswith(f": failed: {why}")
