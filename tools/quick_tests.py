"""Write tests/not_quick.txt: the tests below a folder of tests/ that take too long for `pytest -m quick`.

pytest -m "not slow" --durations=0 --durations-min=0.2 > durations.txt
python tools/quick_tests.py durations.txt --seconds 0.4
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path

LIST = Path(__file__).parents[1] / "tests/not_quick.txt"
ROW = re.compile(r"([\d.]+)s (?:call|setup|teardown) +\S*?(tests/\w+/\S+?)(?:\[.*)?$")


def main() -> None:
    """Read how long each case of a test took; a test counts by its longest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("durations", type=Path, help="what pytest --durations printed")
    parser.add_argument("--seconds", type=float, default=0.4, help="more are too many")
    options = parser.parse_args()
    cases: dict[str, float] = defaultdict(float)
    for line in options.durations.read_text().splitlines():
        if found := ROW.match(line.strip()):
            cases[found[2]] = max(cases[found[2]], float(found[1]))
    names = sorted(name for name, seconds in cases.items() if seconds > options.seconds)
    LIST.write_text("".join(f"{name}\n" for name in names))
    print(f"{len(names)} of the tests in {options.durations} take over {options.seconds} s")


if __name__ == "__main__":
    main()
