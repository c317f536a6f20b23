"""The table of SGLang's kits: ``python -m benchmarks.sglang_kits REPORT.xml ...`` after ``make test-sglang-kits``.

It reads the JUnit reports of tests/e2e/sglang_kits.py, writes one row for each kit and server to RESULTS, and the
generated pages of the documentation anew.
"""

from __future__ import annotations

import argparse
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import run_metadata

RESULTS = Path(__file__).parent / "results/sglang_kits.jsonl"
SERVERS = ("stock", "1.0", "0.1")
_NAME = re.compile(r"test_kit\[(?P<server>[^-]+)-(?P<kit>\w+)-(?P<test>\w+)\]")


def read_reports(reports: Iterable[Path]) -> list[dict[str, Any]]:
    """Rows of kits and servers, without provenance; ValueError if a test failed that was not expected to."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for case in (case for report in reports for case in ElementTree.parse(report).iter("testcase")):
        name = _NAME.fullmatch(case.get("name", ""))
        if name is None:
            continue
        if any(case.find(kind) is not None for kind in ("failure", "error")):
            raise ValueError(f"{case.get('name')} failed; the table is of runs that end as the tests expect")
        row = rows.setdefault((name["kit"], name["server"]), {"kit": name["kit"], "server": name["server"]})
        skipped = case.find("skipped")
        if skipped is None:
            row["passed"] = row.get("passed", 0) + 1
        else:
            row.setdefault("failed", {})[name["test"]] = skipped.get("message")
    return [{"passed": 0, "failed": {}, **row} for row in rows.values()]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: how many tests of each kit pass on which server, and why the others fail."""
    lines = ["| kit | tests | stock | budget 1.0 | budget 0.1 | what fails, and why |", "|---|---|---|---|---|---|"]
    for kit in dict.fromkeys(row["kit"] for row in rows):
        found = {row["server"]: row for row in rows if row["kit"] == kit}
        count = max(row["passed"] + len(row["failed"]) for row in found.values())
        passed = [str(found[server]["passed"]) if server in found else "not run" for server in SERVERS]
        whys: dict[str, dict[str, list[str]]] = {}
        for server in SERVERS:
            for test, why in found.get(server, {"failed": {}})["failed"].items():
                whys.setdefault(why, {}).setdefault(f"`{test}`", []).append(server)
        words = [
            f"{', '.join(tests)} ({'on stock, too' if 'stock' in servers else 'on ' + ' and '.join(servers)}): {why}"
            for why, tests in whys.items()
            for servers in [sorted({server for names in tests.values() for server in names}, reverse=True)]
        ]
        cells = [f"`{kit}`", str(count), *passed, "; ".join(words)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_results() -> list[dict[str, Any]]:
    """Rows of RESULTS."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    from benchmarks import docs

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path, help="JUnit reports; together they have every kit and server")
    given = parser.parse_args(arguments)
    about = run_metadata()
    rows = [json.dumps({**row, **about}) + "\n" for row in read_reports(given.reports)]
    RESULTS.write_text("".join(rows))
    docs.write()


if __name__ == "__main__":
    main()
