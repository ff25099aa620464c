"""The cluster a plan is made for: `h200:2x8`, `cpu:2`, or a YAML file that changes a known machine.

`ours.yaml` is the cluster that the file describes, `ours.yaml:4x8` another one of such hosts.

Imports nothing heavy. `embedding.planning.topology` makes TorchRec's description of it.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Any

from pydantic import PositiveInt, ValidationError

from embedding.config import StrictConfig
from embedding.errors import UserError
from embedding.planning.host_memory import memory_of_this_machine
from embedding.planning.machines import GIB, MACHINES, Machine
from embedding.yaml_text import load_yaml

MACHINE_PATTERN = r"(?P<name>[A-Za-z0-9_-]+|.+\.ya?ml)"
"""A known machine, or a file."""
_SHAPE = re.compile(rf"^{MACHINE_PATTERN}:(?:(?P<hosts>\d+)x)?(?P<ranks>\d+)$")
_FILES = (".yaml", ".yml")
_FORMS = (
    "write it as h200:8 (ranks of one host), h200:2x8 (hosts x ranks) or ours.yaml:2x8, or give a "
    "YAML file alone"
)


class ClusterShape(StrictConfig):
    """Equal hosts with equal ranks."""

    machine: Machine
    num_hosts: PositiveInt = 1
    ranks_per_host: PositiveInt
    file: str | None = None
    """The YAML file that describes the machine."""

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.num_hosts * self.ranks_per_host

    @property
    def name(self) -> str:
        """As `parse_shape` reads it."""
        hosts = f"{self.num_hosts}x" if self.num_hosts > 1 else ""
        return f"{self.file or self.machine.name}:{hosts}{self.ranks_per_host}"

    @property
    def host_bytes_per_rank(self) -> int:
        """A rank's share of its host's memory."""
        host = self.machine.host_bytes or memory_of_this_machine()
        return host // self.ranks_per_host

    @property
    def device_bytes(self) -> int:
        """Memory of one rank that holds tables without offloading."""
        on_cpu = self.machine.device == "cpu"
        return self.host_bytes_per_rank if on_cpu else self.machine.hbm_bytes

    @property
    def cores_per_host(self) -> int | None:
        """On CPU the cores of a host, taken to be this machine's; None on GPUs."""
        return os.cpu_count() if self.machine.device == "cpu" else None

    @property
    def ranks_per_core(self) -> float:
        """On CPU so many ranks take turns on a core; 1 where each has its own."""
        cores = self.cores_per_host
        return 1.0 if cores is None else max(1.0, self.ranks_per_host / cores)

    @property
    def price_per_hour(self) -> float | None:
        """Of all hosts; a host that is used in part is paid in whole."""
        price = self.machine.price_per_hour
        return None if price is None else price * self.num_hosts

    def with_hosts(self, num_hosts: int) -> "ClusterShape":
        """The same hosts, more or fewer of them."""
        return self.model_copy(update={"num_hosts": num_hosts})


def limited(shape: ClusterShape, hbm_gib: float | None) -> ClusterShape:
    """The cluster as if every rank had no more memory than this; None: as it is."""
    if hbm_gib is None:
        return shape
    machine, limit = shape.machine, int(hbm_gib * GIB)
    if machine.device == "cpu":
        whole = machine.host_bytes or memory_of_this_machine()
        changes = {"host_bytes": min(limit * shape.ranks_per_host, whole)}
    else:
        changes = {"hbm_bytes": min(limit, machine.hbm_bytes)}
    return shape.model_copy(update={"machine": machine.model_copy(update=changes)})


def find_machine(name: str) -> Machine:
    """The machine called `name`.

    Raises:
        UserError: There is none; it names the nearest.
    """
    known = {machine.name: machine for machine in MACHINES}
    if name in known:
        return known[name]
    begun = [other for other in known if other.startswith(name.lower())]
    nearest = begun or difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise UserError(
        f"topology: there is no device {name!r}{hint}; known are {', '.join(known)}, or give a "
        "YAML file that describes yours"
    )


def parse_shape(text: str) -> ClusterShape:
    """A topology from the command line.

    Raises:
        UserError: It is none, in a sentence with the remedy.
    """
    if text.endswith(_FILES):
        return read_shape(Path(text))
    match = _SHAPE.match(text)
    if match is None:
        raise UserError(f"topology {text!r} is not a device and a number of ranks; {_FORMS}")
    name, hosts, ranks = match["name"], int(match["hosts"] or 1), int(match["ranks"])
    if name.endswith(_FILES):
        described = read_shape(Path(name))
        return make_shape(described.machine, hosts, ranks, text, described.file)
    return make_shape(find_machine(name), hosts, ranks, text)


def make_shape(
    machine: Machine, num_hosts: int, ranks_per_host: int, where: str, file: str | None = None
) -> ClusterShape:
    """A checked shape; `where` names it in errors, `file` is the machine's.

    Raises:
        UserError: No rank, or more ranks than a host has.
    """
    if num_hosts < 1 or ranks_per_host < 1:
        raise UserError(f"topology {where!r} has no rank; use at least one host and one rank")
    if ranks_per_host > machine.ranks_per_host:
        hosts = -(-num_hosts * ranks_per_host // machine.ranks_per_host)
        raise UserError(
            f"topology {where!r}: a {machine.name} host has {machine.ranks_per_host} ranks, not "
            f"{ranks_per_host}; use {file or machine.name}:{hosts}x{machine.ranks_per_host}, or a "
            "YAML file with another ranks_per_host"
        )
    return ClusterShape(
        machine=machine, num_hosts=num_hosts, ranks_per_host=ranks_per_host, file=file
    )


def read_shape(path: Path) -> ClusterShape:
    """A topology file: `base` (a known device), `hosts`, `ranks`, and keys of `Machine` to change.

    base: h100
    hosts: 4
    ranks: 8
    inter_host_bandwidth: 12.5e9
    price_per_hour: 60

    Raises:
        UserError: The file is missing or not such a mapping.
    """
    if not path.is_file():
        raise UserError(f"topology file {path} does not exist; check the path")
    data = load_yaml(path.read_text(), f"topology file {path}")
    if not isinstance(data, dict):
        raise UserError(f"topology file {path} must be a mapping with base, hosts and ranks")
    changes = dict(data)
    base = changes.get("base")
    hosts, ranks = changes.pop("hosts", 1), changes.pop("ranks", None)
    known = {} if base is None else find_machine(str(base)).model_dump()
    if not isinstance(hosts, int) or not isinstance(ranks, int):
        raise UserError(
            f"topology file {path}: hosts={hosts!r} and ranks={ranks!r} must be whole numbers; "
            "ranks are those of one host"
        )
    full = {"name": path.stem, "ranks_per_host": max(ranks, 1), "source": str(path)}
    try:
        machine = Machine.model_validate(known | full | _numbers(changes))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(
            f"topology file {path}: {faults}; keys are hosts, ranks and "
            f"{', '.join(Machine.model_fields)}"
        ) from error
    return make_shape(machine, hosts, ranks, str(path), str(path))


def _numbers(changes: dict[str, Any]) -> dict[str, Any]:
    """YAML reads 12.5e9 without a sign in the exponent as text."""
    read: dict[str, Any] = {}
    for key, value in changes.items():
        try:
            read[key] = float(value) if isinstance(value, str) else value
        except ValueError:
            read[key] = value
    return {
        k: int(v) if k.endswith("_bytes") and isinstance(v, float) else v for k, v in read.items()
    }
