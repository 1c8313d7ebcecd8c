"""The second pass of ``.ci/run`` runs exactly the tests that the first skipped for a missing library."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_skipped_tests_run_where_the_library_is_installed(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('way', ['a way', 'b'])\n"
        "def test_with(way): pytest.importorskip('my_library')\n"
        "def test_without(): pass\n"
        "@pytest.mark.skip(reason='another reason')\n"
        "def test_never(): pass\n"
    )
    (tmp_path / "test_all.py").write_text(
        "import pytest\npytest.importorskip('my_library')\ndef test_one(): pass\ndef test_two(): pass\n"
    )

    def tests(*flags: str) -> str:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "2",
            "-p",
            "tests.missing_libraries",
            "-p",
            "no:cacheprovider",
        ]
        done = subprocess.run(
            [*command, *flags],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()[-1]

    assert tests("--missing-libraries=missing.txt").startswith("1 passed, 4 skipped")
    assert (tmp_path / "missing.txt").read_text().splitlines() == [
        "test_all.py", "test_some.py::test_with[a way]", "test_some.py::test_with[b]"
    ]  # fmt: skip
    (tmp_path / "my_library.py").touch()
    assert tests("@missing.txt", "--missing-libraries=still.txt").startswith("4 passed in")
    assert (tmp_path / "still.txt").read_text() == ""
