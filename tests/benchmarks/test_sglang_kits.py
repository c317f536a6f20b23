import pytest

from benchmarks.sglang_kits import read_reports, table

CASE = '<testcase name="test_kit[{server}-Kit-{test}]">{outcome}</testcase>'
SKIPPED = '<skipped type="pytest.xfail" message="outputs are not cached"/>'


def report(path, *cases):
    rows = [CASE.format(server=server, test=test, outcome=outcome) for server, test, outcome in cases]
    path.write_text(f"<testsuites><testsuite>{''.join(rows)}</testsuite></testsuites>")
    return path


def test_reports_become_a_table(tmp_path):
    both = [report(tmp_path / "stock.xml", ("stock", "test_a", ""), ("stock", "test_b", ""))]
    both.append(report(tmp_path / "ours.xml", ("1.0", "test_a", ""), ("1.0", "test_b", SKIPPED)))
    why = "`test_b` (on 1.0): outputs are not cached"
    assert table(read_reports(both)).splitlines()[2:] == [f"| `Kit` | 2 | 2 | 1 | not run | {why} |"]


def test_a_run_with_a_fault_is_no_result(tmp_path):
    path = report(tmp_path / "red.xml", ("stock", "test_a", "<failure/>"))
    with pytest.raises(ValueError, match=r"test_kit\[stock-Kit-test_a\] failed"):
        read_reports([path])
