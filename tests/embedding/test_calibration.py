"""Calibrations are used where they hold and refused elsewhere, in a sentence."""

import os
from pathlib import Path

import pytest

from embedding.errors import UserError
from embedding.planning.calibration import (
    Calibration,
    RanksFit,
    constants_for,
    installed_versions,
    processor_name,
)
from embedding.planning.cluster_shape import ClusterShape, parse_shape
from embedding.planning.cost_constants import LINK_SHARE, data_sheet_constants


def fit(topology: str, byte_s: float) -> RanksFit:
    shape = parse_shape(topology)
    sheet = data_sheet_constants(shape)
    measured = {"exchange_bytes": byte_s, "output_inter_bytes": 1.0}
    return RanksFit(
        world_size=shape.world_size,
        ranks_per_host=shape.ranks_per_host,
        constants=sheet.model_copy(update={"seconds": sheet.seconds | measured}),
        parts={},
        residuals=(),
        median_abs_error=0.1,
        rank_correlation=0.9,
    )


def calibration(machine: str = "cpu", **changes: object) -> Calibration:
    made = Calibration(
        machine=machine,
        device_name=processor_name(),
        cores=os.cpu_count() or 1,
        versions=installed_versions(),
        created_at="2024-01-01",
        fits=(fit(f"{machine}:2", 2.0), fit(f"{machine}:8", 8.0)),
    )
    return made.model_copy(update=changes)


def written(tmp_path: Path, made: Calibration) -> Path:
    path = tmp_path / "calibration.json"
    path.write_text(made.model_dump_json())
    return path


def test_the_nearest_number_of_ranks_is_used(tmp_path: Path) -> None:
    path = written(tmp_path, calibration())
    for topology, expected in (("cpu:2", 2.0), ("cpu:3", 2.0), ("cpu:8", 8.0), ("cpu:32", 8.0)):
        assert constants_for(parse_shape(topology), path).seconds["exchange_bytes"] == expected
    assert constants_for(parse_shape("cpu:2"), None).source == "data sheet"


def test_links_between_hosts_come_from_the_data_sheet_if_one_host_was_measured(
    tmp_path: Path,
) -> None:
    made = calibration("h200", device_name="NVIDIA H200")
    constants = constants_for(parse_shape("h200:4x8"), written(tmp_path, made))
    sheet = data_sheet_constants(parse_shape("h200:4x8"))
    assert constants.seconds["exchange_bytes"] == 8.0
    assert constants.seconds["output_inter_bytes"] == sheet.seconds["output_inter_bytes"]
    assert "data sheet" in constants.source


def ours(tmp_path: Path, changes: str) -> ClusterShape:
    path = tmp_path / "ours.yaml"
    path.write_text(f"base: h200\nhosts: 2\nranks: 8\n{changes}\n")
    return parse_shape(str(path))


def test_a_calibration_of_the_base_holds_for_a_file_that_changes_nothing_measured(
    tmp_path: Path,
) -> None:
    made = calibration("h200", device_name="NVIDIA H200")
    path = written(tmp_path, made)
    shape = ours(tmp_path, "host_bytes: 1e12\nprice_per_hour: 60\ninter_host_bandwidth: 12.5e9")
    constants = constants_for(shape, path)
    assert constants.seconds["exchange_bytes"] == 8.0
    assert constants.seconds["output_inter_bytes"] == pytest.approx(1 / (LINK_SHARE * 12.5e9))
    # Measured between hosts, their links are no longer the file's.
    two_hosts = written(tmp_path, calibration("h200", fits=(fit("h200:2x8", 3.0),)))
    with pytest.raises(UserError, match="changes of h200: inter_host_bandwidth; leave that out"):
        constants_for(shape, two_hosts)


@pytest.mark.parametrize(
    ("machine", "changes", "message"),
    [
        ("h200", "hbm_bandwidth: 1e12", "ours.yaml changes of h200: hbm_bandwidth; leave that out"),
        ("h100", "price_per_hour: 60", "on 'h100' .* is .*ours.yaml:2x8, whose base is h200;"),
    ],
)
def test_a_calibration_that_does_not_hold_for_a_file_names_the_way_out(
    tmp_path: Path, machine: str, changes: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        constants_for(ours(tmp_path, changes), written(tmp_path, calibration(machine)))


def made_up(topology: str) -> RanksFit:
    """A fit whose constants are all far from the data sheet's."""
    made = fit(topology, 1.0)
    constants = made.constants.model_copy(
        update={"seconds": dict.fromkeys(made.constants.seconds, 7.0)}
    )
    return made.model_copy(update={"constants": constants, "parts": {"prefetch_bytes": 7.0}})


def test_one_rank_alone_says_nothing_of_exchanges(tmp_path: Path) -> None:
    path = written(tmp_path, calibration(fits=(made_up("cpu:1"),)))
    several, sheet = parse_shape("cpu:4"), data_sheet_constants(parse_shape("cpu:4"))
    constants = constants_for(several, path)
    for name in (
        *("input_calls", "input_sent_ids", "exchange_calls", "exchange_bytes", "reduce_calls"),
        *("reduce_bytes", "backward_exchange_bytes", "backward_gather_bytes"),
        *("all_reduce_bytes", "replicated_calls"),
    ):
        assert constants.seconds[name] == sheet.seconds[name], name
    for name in ("lookup_calls", "lookup_bytes", "update_bytes", "backward_calls"):
        assert constants.seconds[name] == 7.0, name
    assert constants.source.startswith("calibration of 1 rank on ")
    assert "exchanges between ranks from the data sheet" in constants.source
    alone = constants_for(parse_shape("cpu:1"), path)
    assert set(alone.seconds.values()) == {7.0}
    assert "data sheet" not in alone.source
    both = written(tmp_path, calibration(fits=(made_up("cpu:1"), made_up("cpu:2"))))
    assert set(constants_for(several, both).seconds.values()) == {7.0}


def test_filling_of_caches_is_the_data_sheets_as_nothing_measures_it(tmp_path: Path) -> None:
    made = calibration("h200", device_name="NVIDIA H200", fits=(made_up("h200:8"),))
    constants = constants_for(parse_shape("h200:8"), written(tmp_path, made))
    sheet = data_sheet_constants(parse_shape("h200:8"))
    for name in ("prefetch_calls", "prefetch_ids", "prefetch_bytes"):
        assert constants.seconds[name] == sheet.seconds[name]
    assert constants.seconds["lookup_host_bytes"] == 7.0
    assert "filling of caches from the data sheet" in constants.source


@pytest.mark.parametrize(
    ("changes", "topology", "message"),
    [
        ({"versions": {"torch": "1.0"}}, "cpu:2", "made with torch 1.0"),
        ({"device_name": "Another CPU"}, "cpu:2", "of Another CPU and this machine has"),
        ({"cores": 1000}, "cpu:2", "1000 cores"),
        ({}, "h100:8", "made on 'cpu'"),
    ],
)
def test_a_stale_calibration_is_refused_with_what_differs(
    tmp_path: Path, changes: dict, topology: str, message: str
) -> None:
    path = written(tmp_path, calibration(**changes))
    with pytest.raises(UserError, match=message) as raised:
        constants_for(parse_shape(topology), path)
    assert "bench plan --calibrate" in str(raised.value)


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        constants_for(parse_shape("cpu:2"), tmp_path / "none.json")
    path = tmp_path / "other.json"
    path.write_text('{"schema_version": 9}')
    with pytest.raises(UserError, match="no calibration of this version"):
        constants_for(parse_shape("cpu:2"), path)
    path = written(tmp_path, calibration(fits=()))
    with pytest.raises(UserError, match="no calibration of this version"):
        constants_for(parse_shape("cpu:2"), path)
