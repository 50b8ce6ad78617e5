"""
Fetches the common tests of the installed transformers: `python prepare.py FOLDER`.

Wheels don't contain them, but the source distribution on PyPI has the top-level files of `tests/`. They are unpacked into
the package FOLDER/transformers_tests. What they import from subfolders, which are not distributed, is replaced by
stand-ins: those tests don't apply to encoders (generation), or are not run (export).
"""

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

import transformers


STAND_INS = {
    "transformers_tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "transformers_tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "transformers_tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    # The pipelines' tests import transformers' source folder, which is replaced by the installed package, and read
    # which tiny models there are.
    "src/transformers/__init__.py": "",
    "reports/tiny_model_summary.json": json.dumps({}),
}


def prepare(folder: Path) -> int:
    """Unpacks the tests into a folder, and returns their number of files."""
    shutil.rmtree(folder, ignore_errors=True)
    package = folder / "transformers_tests"
    package.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as downloads:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", downloads, f"transformers=={transformers.__version__}"], check=True)
        (archive,) = Path(downloads).iterdir()
        with tarfile.open(archive) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if member.isfile() and path.parts[1:-1] == ("tests",) and path.suffix == ".py":
                    (package / path.name).write_bytes(tar.extractfile(member).read())
    count = len(list(package.iterdir()))
    for name, content in STAND_INS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    for inner in (package, *(path for path in package.iterdir() if path.is_dir())):
        (inner / "__init__.py").touch()
    return count


if __name__ == "__main__":
    found = prepare(Path(sys.argv[1]))
    print(f"{found} files of tests of transformers {transformers.__version__} in {sys.argv[1]}")
