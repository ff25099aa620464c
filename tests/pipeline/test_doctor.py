import pytest

from pipeline.doctor import version_remedy, wheels_remedy


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
