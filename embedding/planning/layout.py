"""Tables placed so far, with the load of every rank: the search changes one table at a time."""

# Shapes: P phases, W ranks.

from collections import Counter
from collections.abc import Mapping

import numpy as np

from embedding.planning.choices import Choice
from embedding.planning.cost import CostModel, GroupKey, Placed, Priced
from embedding.planning.plan_description import PHASES

_TIE = 1e-4
"""Weight of a rank's own load where the slowest rank would stay as slow: balances what is left."""


class Layout:
    """A partial or whole placement. Prices come from the model; sums are kept up to date."""

    def __init__(self, model: CostModel) -> None:
        self.model = model
        world, hosts = model.shape.world_size, model.shape.num_hosts
        self.seconds_PW = np.zeros((len(PHASES), world))
        self.device_bytes_W = np.full(world, float(model.constants.process_bytes))
        self.host_bytes_H = np.zeros(hosts)
        self.groups: Counter[GroupKey] = Counter()
        self.groups_s = 0.0
        """Seconds of the groups in use."""
        self.placement: dict[str, Placed] = {}

    def copy(self) -> "Layout":
        """An independent layout with the same tables."""
        other = Layout(self.model)
        other.seconds_PW = self.seconds_PW.copy()
        other.device_bytes_W = self.device_bytes_W.copy()
        other.host_bytes_H = self.host_bytes_H.copy()
        other.groups, other.groups_s = self.groups.copy(), self.groups_s
        other.placement = dict(self.placement)
        return other

    def cost(self) -> float:
        """Seconds of the sparse part of a step."""
        return self.model.step_seconds(self.seconds_PW, self.groups_s)

    def slack(self) -> float:
        """How much a perfect balance of the same choices would save."""
        uneven_P = self.seconds_PW.max(axis=1) - self.seconds_PW.mean(axis=1)
        return float(uneven_P.sum())

    def fits(self) -> bool:
        """Whether every rank and every host has the memory."""
        return self._within(self.device_bytes_W, self.host_bytes_H)

    def add(self, table: str, placed: Placed) -> None:
        """Place a table that is not placed."""
        self._change(table, placed, 1.0)
        self.placement[table] = placed

    def remove(self, table: str) -> Placed:
        """Take a table away; where it was."""
        placed = self.placement.pop(table)
        self._change(table, placed, -1.0)
        return placed

    def best_targets(self, table: str, choice: Choice) -> tuple[int, ...] | None:
        """Where the units of a choice do least harm; None if a unit fits nowhere."""
        priced = self.model.price(table, choice)
        # Buffers are on every rank, also on those that get no unit.
        if self.device_bytes_W.max() + priced.everyone_bytes > self.model.device_capacity:
            return None
        match choice.domain:
            case "all":
                return (0,) if self._fits_everywhere(priced) else None
            case "host":
                targets = self._best_hosts(priced)
            case "rank":
                targets = self._best_ranks(priced)
        if targets is None or len(targets) == 1 or self._holds(priced, targets):
            return targets
        return None

    def cost_with(self, table: str, placed: Placed) -> float:
        """The cost if the table were added."""
        priced = self.model.price(table, placed.choice)
        seconds_PW = self.seconds_PW + priced.everyone_s[:, None]
        for target in placed.targets:
            seconds_PW[:, self.model.owners(placed.choice, target)] += priced.owner_s[:, None]
        key = self.model.group_of(table, placed.choice)
        group_s = 0.0 if self.groups[key] else self.model.group_price(key)
        return self.model.step_seconds(seconds_PW, self.groups_s + group_s)

    def _change(self, table: str, placed: Placed, sign: float) -> None:
        priced = self.model.price(table, placed.choice)
        self.seconds_PW += sign * priced.everyone_s[:, None]
        self.device_bytes_W += sign * priced.everyone_bytes
        for target in placed.targets:
            owners = self.model.owners(placed.choice, target)
            self.seconds_PW[:, owners] += sign * priced.owner_s[:, None]
            self.device_bytes_W[owners] += sign * priced.owner_bytes
            self._add_host_bytes(self.host_bytes_H, owners, sign * priced.owner_host_bytes)
        key = self.model.group_of(table, placed.choice)
        if self.groups[key] == (0 if sign > 0 else 1):
            self.groups_s += sign * self.model.group_price(key)
        self.groups[key] += int(sign)

    def _fits_everywhere(self, priced: Priced) -> bool:
        device = self.device_bytes_W.max() + priced.everyone_bytes + priced.owner_bytes
        per_host = self.model.shape.ranks_per_host
        host = self.host_bytes_H.max() + priced.owner_host_bytes * per_host
        return bool(device <= self.model.device_capacity and host <= self.model.host_capacity)

    def _holds(self, priced: Priced, targets: tuple[int, ...]) -> bool:
        """Whether all units of a table fit at once: several may share a rank, or a host."""
        device_W, host_H = self.device_bytes_W + priced.everyone_bytes, self.host_bytes_H.copy()
        for target in targets:
            owners = self.model.owners(priced.choice, target)
            device_W[owners] += priced.owner_bytes
            self._add_host_bytes(host_H, owners, priced.owner_host_bytes)
        return self._within(device_W, host_H)

    def _within(self, device_W: np.ndarray, host_H: np.ndarray) -> bool:
        return bool(
            device_W.max() <= self.model.device_capacity
            and host_H.max() <= self.model.host_capacity
        )

    def _add_host_bytes(self, host_H: np.ndarray, owners: slice, num_bytes: float) -> None:
        """`num_bytes` for each of the ranks, on their hosts."""
        if num_bytes:
            ranks = np.arange(owners.start, owners.stop)
            np.add.at(host_H, ranks // self.model.shape.ranks_per_host, num_bytes)

    def _room(self, priced: Priced) -> np.ndarray:
        """Ranks on which one unit fits."""
        per_host = self.model.shape.ranks_per_host
        device_W = self.device_bytes_W + priced.everyone_bytes + priced.owner_bytes
        host_W = np.repeat(self.host_bytes_H + priced.owner_host_bytes, per_host)
        fits_W: np.ndarray = (device_W <= self.model.device_capacity) & (
            host_W <= self.model.host_capacity
        )
        return fits_W

    def _harm(self, priced: Priced) -> np.ndarray:
        """How much longer the step gets with one unit on a rank, and a little of its own load."""
        slowest_P = self.seconds_PW.max(axis=1)
        after_PW = self.seconds_PW + priced.owner_s[:, None]
        longer_W = np.maximum(after_PW - slowest_P[:, None], 0).sum(axis=0)
        memory_W = self.device_bytes_W / max(self.model.device_capacity, 1.0)
        load_W = after_PW.sum(axis=0) + memory_W * after_PW.sum() / len(memory_W)
        harm_W: np.ndarray = longer_W + _TIE * load_W
        return harm_W

    def _best_ranks(self, priced: Priced) -> tuple[int, ...] | None:
        units = priced.choice.num_units
        room_W = self._room(priced)
        harm_W = np.where(room_W, self._harm(priced), np.inf)
        if priced.choice.one_host:
            per_host = self.model.shape.ranks_per_host
            harm_HL = np.sort(harm_W.reshape(-1, per_host), axis=1)[:, :units].sum(axis=1)
            host = int(harm_HL.argmin())
            first, last = host * per_host, (host + 1) * per_host
            outside = np.ones(len(harm_W), dtype=bool)
            outside[first:last] = False
            harm_W = np.where(outside, np.inf, harm_W)
        order = np.argsort(harm_W, kind="stable")[: min(units, int(np.isfinite(harm_W).sum()) or 1)]
        # More column shards than ranks: they take turns.
        chosen = [int(order[unit % len(order)]) for unit in range(units)]
        return tuple(chosen) if np.isfinite(harm_W[chosen]).all() else None

    def _best_hosts(self, priced: Priced) -> tuple[int, ...] | None:
        per_host, units = self.model.shape.ranks_per_host, priced.choice.num_units
        room_H = self._room(priced).reshape(-1, per_host).all(axis=1)
        if priced.owner_host_bytes:
            whole = self.host_bytes_H + priced.owner_host_bytes * per_host
            room_H &= whole <= self.model.host_capacity
        harm_H = self._harm(priced).reshape(-1, per_host).max(axis=1)
        harm_H = np.where(room_H, harm_H, np.inf)
        order = np.argsort(harm_H, kind="stable")[:units]
        chosen = [int(order[unit % len(order)]) for unit in range(units)]
        return tuple(chosen) if np.isfinite(harm_H[chosen]).all() else None


def layout_of(model: CostModel, placement: Mapping[str, Placed]) -> Layout:
    """A whole placement as a layout."""
    layout = Layout(model)
    for table, placed in placement.items():
        layout.add(table, placed)
    return layout
