"""What `braid doctor` says of environments that do not fit, and of such that are broken."""

import subprocess
from typing import Any

import pytest

from pipeline import doctor
from pipeline.doctor import Finding, diagnose, version_remedy, wheels_remedy


@pytest.mark.parametrize(
    ("versions", "fits"),
    [
        (("2.13.0+cpu", "1.8.0", "1.8.0"), True),
        (("2.11.0", "1.6.1", "1.6.0"), True),
        (("2.13.0", "1.6.1", "1.6.0"), False),
        (("2.13.0", "1.8.0", "none"), False),
        (("1.9.0", "1.8.0", "1.8.0"), False),
    ],
)
def test_versions_must_have_been_built_together(versions: tuple[str, str, str], fits: bool) -> None:
    assert (version_remedy(*versions) == "") is fits


@pytest.mark.parametrize(
    ("installed", "remedy"),
    [
        ({"fbgemm-gpu-cpu"}, ""),
        ({"fbgemm-gpu"}, ""),
        ({"fbgemm-gpu", "fbgemm-gpu-cpu"}, "pip uninstall"),
        (set(), "requirements/cpu.txt"),
    ],
)
def test_exactly_one_fbgemm_wheel_is_allowed(installed: set[str], remedy: str) -> None:
    found = wheels_remedy(installed)

    assert remedy in found
    assert bool(found) is bool(remedy)


def test_a_check_that_fails_itself_is_a_finding_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hangs(command: list[str], **_: Any) -> None:
        raise subprocess.TimeoutExpired(["python"], 180)

    def breaks() -> Finding:
        raise ImportError("first line\nlibtorch.so: cannot open [/x]")

    monkeypatch.setattr(subprocess, "run", hangs)
    monkeypatch.setattr(doctor, "_accelerator", breaks)
    monkeypatch.setattr(doctor, "_bf16", breaks)

    findings = {finding.check: finding for finding in diagnose()}

    assert findings["python"].ok
    assert findings["accelerator"].found == "ImportError: libtorch.so: cannot open [/x]"
    assert "timed out after 180 seconds" in findings["ray"].found
    for name in ("kernels", "accelerator", "bf16", "ray"):
        assert not findings[name].ok
        assert "make clean" in findings[name].remedy
