"""Topologies as text and files, and what is said about those that are none."""

from pathlib import Path

import pytest

from embedding.errors import UserError
from embedding.planning.cluster_shape import find_machine, parse_shape
from embedding.planning.machines import MACHINES
from embedding.planning.this_machine import machine_of_gpu


@pytest.mark.parametrize(
    ("text", "hosts", "ranks"),
    [
        ("cpu:2", 1, 2),
        ("h200:8", 1, 8),
        ("h200:1x8", 1, 8),
        ("h100:4x8", 4, 8),
        ("a100-40:2x8", 2, 8),
    ],
)
def test_topologies_are_hosts_times_ranks(text: str, hosts: int, ranks: int) -> None:
    shape = parse_shape(text)
    assert (shape.num_hosts, shape.ranks_per_host) == (hosts, ranks)
    assert shape.world_size == hosts * ranks
    assert parse_shape(shape.name) == shape


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h20:8", "did you mean 'h200'"),
        ("a100:8", "did you mean 'a100-"),
        ("h200", "is not a device and a number of ranks"),
        ("h200:2x", "is not a device and a number of ranks"),
        ("cpu:0", "has no rank"),
        ("h100:0x8", "has no rank"),
        ("h100:16", "use h100:2x8"),
        ("missing.yaml", "does not exist"),
    ],
)
def test_what_is_no_topology_is_said_with_the_remedy(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_shape(text)


def test_a_file_changes_a_known_machine(tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text(
        "base: h100\nhosts: 3\nranks: 4\ninter_host_bandwidth: 12.5e9\nprice_per_hour: 60\n"
    )
    shape = parse_shape(str(path))
    assert (shape.num_hosts, shape.ranks_per_host, shape.machine.name) == (3, 4, "ours")
    assert shape.machine.inter_host_bandwidth == 12.5e9
    assert shape.machine.hbm_bytes == find_machine("h100").hbm_bytes
    assert shape.price_per_hour == 180


OURS = "base: h100\nhosts: 3\nranks: 4\ninter_host_bandwidth: 12.5e9\n"


def test_a_files_shape_has_a_name_that_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text(OURS)
    shape = parse_shape(str(path))
    assert shape.name == f"{path}:3x4"
    for shown in (shape, shape.with_hosts(7)):
        assert parse_shape(shown.name) == shown
    one = parse_shape(f"{path}:2")
    assert (one.num_hosts, one.ranks_per_host, one.machine) == (1, 2, shape.machine)
    with pytest.raises(UserError, match=rf"a ours host has 4 ranks, not 8; use {path}:2x4"):
        parse_shape(f"{path}:8")
    with pytest.raises(UserError, match="none.yaml does not exist"):
        parse_shape("none.yaml:2x4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: h100\nhosts: 2\n", "whole numbers"),
        ("base: h100\nranks: 2\nhbm: 3\n", "hbm"),
        ("- 1\n", "must be a mapping"),
        ("base: [", "not valid YAML"),
        ("base: h100\nranks: 2\nranks: 4\n", "ours.yaml, line 3: ranks is set a second time"),
        ("ranks: 2\n", "Field required"),
    ],
)
def test_a_wrong_file_is_said(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        parse_shape(str(path))


def test_every_machine_names_its_source_and_is_faster_inside_than_outside() -> None:
    for machine in MACHINES:
        assert "data sheet" in machine.source
        if machine.device == "cuda":
            assert machine.hbm_bandwidth > machine.intra_host_bandwidth
            assert machine.intra_host_bandwidth > machine.inter_host_bandwidth


@pytest.mark.parametrize(
    ("reported", "machine"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-PCIE-40GB", "a100-40-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80-pcie"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla V100-SXM2-32GB", "v100"),
    ],
)
def test_a_gpu_is_found_by_the_name_it_reports(reported: str, machine: str) -> None:
    found = machine_of_gpu(reported, 5)
    assert (found.name, found.hbm_bytes) == (machine, 5)
    assert found.hbm_bandwidth == find_machine(machine).hbm_bandwidth


@pytest.mark.parametrize(
    ("card", "sxm"),
    [
        ("h100-pcie", "h100"),
        ("h100-nvl", "h100"),
        ("h200-nvl", "h200"),
        ("a100-80-pcie", "a100-80"),
    ],
)
def test_a_card_exchanges_over_pcie_where_the_sxm_module_has_nvlink(card: str, sxm: str) -> None:
    found, module = find_machine(card), find_machine(sxm)
    assert found.intra_host_bandwidth == found.pcie_bandwidth == module.pcie_bandwidth
    assert module.intra_host_bandwidth > 7 * found.intra_host_bandwidth
    assert found.flops_bf16 <= module.flops_bf16
    assert "PCIe" in found.source


@pytest.mark.parametrize("reported", ["NVIDIA GH200 480GB", "NVIDIA L40", "NVIDIA RTX A6000"])
def test_an_unknown_gpu_is_a_guess_that_is_said(
    reported: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = machine_of_gpu(reported, 5)
    assert (found.name, found.hbm_bytes) == (reported, 5)
    assert "guess" in found.source
    assert reported in caplog.text
    assert "--calibrate" in caplog.text
