"""What is said of a running service: each change of what a replica serves, once."""

from deploy.serving.wire import ServiceState


class StateLines:
    """Remembers what was said last of every replica, which differ while models change."""

    def __init__(self, url: str, num_replicas: int) -> None:
        """`url`: in front of /score."""
        self._url = url
        self._names_replicas = num_replicas > 1
        self._said: dict[str, str] = {}

    def of(self, state: ServiceState) -> str | None:
        """The line of a replica that has answered; None where it said the same before."""
        model = state.model
        which = model.bundle if model.date is None else f"the model of {model.date}"
        text = f"serves {which} ({model.artifact_id})"
        if state.last_error is None:
            text += f" at {self._url}/score (what it asks for: {self._url}/docs)"
        else:
            text = f"still {text}: {state.last_error}"
        if self._names_replicas:
            text = f"replica {state.replica}: {text}"
        return text if self._is_news(state.replica, text) else None

    def of_silence(self, why: str) -> str | None:
        """The line of a service that does not answer; whatever answers next is said again."""
        if set(self._said) - {""}:
            self._said = {}
        text = f"no replica answers: {why}"
        return text if self._is_news("", text) else None

    def _is_news(self, replica: str, text: str) -> bool:
        if replica:
            self._said.pop("", None)
        if self._said.get(replica) == text:
            return False
        self._said[replica] = text
        return True
