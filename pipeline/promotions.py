"""What was in production of an output directory, and what of it was withdrawn.

`pipeline.registry` keeps it, in production.json.
"""

from typing import Literal

from embedding.config import StrictConfig


class Promotion(StrictConfig):
    """One change of what is in production."""

    date: str
    artifact_id: str
    """Of the bundle: promoted, or, in a rollback, withdrawn."""
    at: str
    rollback: bool = False
    train: str
    """Artifact id of its training."""


class Promotions(StrictConfig):
    """All changes, oldest first; version 2."""

    schema_version: Literal[2] = 2
    history: tuple[Promotion, ...] = ()

    @property
    def in_force(self) -> list[Promotion]:
        """Promotions that were not withdrawn; the last one is in production."""
        return self._replayed()[0]

    @property
    def withdrawn(self) -> list[Promotion]:
        """Promotions of bundles that were withdrawn and not put back.

        By a rollback, by going back to an earlier bundle of their day, or by promoting one of an
        earlier day in their place, which no run does. A rollback right after the latter undoes it,
        and puts them back.
        """
        stack, found = self._replayed()
        now = stack[-1].artifact_id if stack else None
        return [change for identity, change in found.items() if identity != now]

    @property
    def approved(self) -> list[Promotion]:
        """Promotions in force of bundles that are not among `withdrawn`."""
        return [change for change in self.in_force if not self.is_withdrawn(change.artifact_id)]

    def ever_promoted(self, artifact_id: str) -> bool:
        """Whether the bundle was in production at some time."""
        return any(change.artifact_id == artifact_id for change in self.history)

    def is_withdrawn(self, artifact_id: str) -> bool:
        """Whether a bundle is among `withdrawn`."""
        return any(change.artifact_id == artifact_id for change in self.withdrawn)

    def is_superseded(self, artifact_id: str) -> bool:
        """Whether another bundle took the place of one that was good."""
        is_in_force = any(change.artifact_id == artifact_id for change in self.in_force[:-1])
        return is_in_force and not self.is_withdrawn(artifact_id)

    def promoted(self, entry: Promotion) -> "Promotions":
        """After a promotion; the same where that bundle is in production.

        One that another of its day has replaced is returned to by rollbacks: promoted on top of
        the other, a rollback of it would put the other, which was given up, back into production.
        """
        is_known = any(change.artifact_id == entry.artifact_id for change in self.in_force)
        if not is_known or self.in_force[-1].date != entry.date:
            return Promotions(history=(*self.history, entry))
        after = self
        while (top := after.in_force[-1]).artifact_id != entry.artifact_id:
            given_up = top.model_copy(update={"rollback": True, "at": entry.at})
            after = Promotions(history=(*after.history, given_up))
        return after

    def taken_back(self, at: str) -> "Promotions":
        """After a rollback, which passes over models that were withdrawn themselves.

        Nothing is in force afterwards where there is none to return to.
        """
        history, stack = self.history, self.in_force
        while stack:
            entry = stack[-1].model_copy(update={"rollback": True, "at": at})
            history = (*history, entry)
            stack, withdrawn = Promotions(history=history)._replayed()
            if stack and stack[-1].artifact_id not in withdrawn:
                break
        return Promotions(history=history)

    def _replayed(self) -> tuple[list[Promotion], dict[str, Promotion]]:
        """What is in force, and by bundle what was withdrawn (the one in production may be)."""
        stack: list[Promotion] = []
        found: dict[str, Promotion] = {}
        # What was withdrawn before each promotion in force, until another one confirms it.
        before: list[dict[str, Promotion] | None] = []
        for change in self.history:
            if change.rollback:
                taken, undone = stack.pop(), before.pop()
                found = found if undone is None else undone
                if undone is None or all(c.artifact_id != taken.artifact_id for c in stack):
                    found[taken.artifact_id] = taken
                continue
            if stack:  # whatever was returned to had been approved
                found.pop(stack[-1].artifact_id, None)
            before = [None] * len(stack) + [dict(found)]
            found |= {c.artifact_id: c for c in stack if c.date > change.date}
            found.pop(change.artifact_id, None)
            stack.append(change)
        return stack, found
