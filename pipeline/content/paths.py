"""Where stored item content lies, as it crosses to workers and actors."""

from pathlib import Path

from embedding.config import StrictConfig


class ContentPaths(StrictConfig):
    """An index of a day's items, and the tokens it points to."""

    index: Path
    """Directory of the content artifact."""
    stores: Path
    """Directory of all token stores."""

    def absolute(self) -> "ContentPaths":
        """The same for a process with another working directory."""
        return ContentPaths(index=self.index.absolute(), stores=self.stores.absolute())
