"""Configuration of the classifiers: which interactions a model computes.

Imports pydantic and nothing heavy, so that `braid validate` and `--help` never load torch.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from embedding.config import StrictConfig

Hidden = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
"""Widths of the hidden layers of an MLP."""
Dropout = Annotated[float, Field(ge=0, lt=1)]


class LogisticRegression(StrictConfig):
    """Logistic regression."""

    kind: Literal["lr"] = "lr"


class Fm(StrictConfig):
    """Factorisation machine."""

    kind: Literal["fm"] = "fm"


class Ffm(StrictConfig):
    """Field-aware factorisation machine, on projections of one embedding a field."""

    kind: Literal["ffm"] = "ffm"
    dim: PositiveInt = 4
    """Width of the vector a field shows to each other field."""


class Dnn(StrictConfig):
    """MLP on all embeddings and dense features."""

    kind: Literal["dnn"] = "dnn"
    hidden: Hidden = (256, 128)
    dropout: Dropout = 0.0


class WideDeep(StrictConfig):
    """First-order term beside an MLP."""

    kind: Literal["wide_deep"] = "wide_deep"
    hidden: Hidden = (256, 128)
    dropout: Dropout = 0.0


class DeepFm(StrictConfig):
    """Factorisation machine and MLP on the same embeddings."""

    kind: Literal["deepfm"] = "deepfm"
    hidden: Hidden = (256, 128)
    dropout: Dropout = 0.0


class Ccpm(StrictConfig):
    """Convolutions over neighbouring fields with k-max pooling."""

    kind: Literal["ccpm"] = "ccpm"
    maps: tuple[PositiveInt, ...] = (4, 4)
    """Channels of every convolution."""
    heights: tuple[PositiveInt, ...] = (6, 5)
    """Fields a kernel of every convolution covers."""

    @model_validator(mode="after")
    def _check_lists(self) -> Self:
        check_same_length(self, ("maps", "heights"))
        return self


class Ipnn(StrictConfig):
    """MLP on the inner products of all pairs of fields and the fields themselves."""

    kind: Literal["ipnn"] = "ipnn"
    hidden: Hidden = (256, 128)
    dropout: Dropout = 0.0


class Opnn(StrictConfig):
    """MLP on kernel products of all pairs of fields and the fields themselves."""

    kind: Literal["opnn"] = "opnn"
    kernel: Literal["matrix", "vector", "number"] = "matrix"
    """Weights of a pair's outer product: all D x D, the diagonal, or one number."""
    hidden: Hidden = (256, 128)
    dropout: Dropout = 0.0


class Pin(StrictConfig):
    """Product network in network: a small network a pair of fields, and an MLP on top."""

    kind: Literal["pin"] = "pin"
    pair_hidden: PositiveInt = 16
    """Width of the hidden layer of a pair's network."""
    pair_dim: PositiveInt = 4
    """Outputs of a pair's network."""
    hidden: Hidden = (256, 128)
    dropout: Dropout = 0.0


class XDeepFm(StrictConfig):
    """Compressed interaction network, MLP and first-order term."""

    kind: Literal["xdeepfm"] = "xdeepfm"
    maps: tuple[PositiveInt, ...] = Field(default=(64, 64), min_length=1)
    """Feature maps of every CIN layer."""
    hidden: Hidden = (256, 128)
    dropout: Dropout = 0.0


class DcnV2(StrictConfig):
    """Cross layers beside an MLP."""

    kind: Literal["dcn_v2"] = "dcn_v2"
    num_cross_layers: PositiveInt = 3
    rank: PositiveInt | None = None
    """Rank of the cross weights; full by default."""
    hidden: Hidden = (256, 128)
    dropout: Dropout = 0.0


class Dlrm(StrictConfig):
    """Inner products of all pairs of fields and of the dense features' vector, MLP on top."""

    kind: Literal["dlrm"] = "dlrm"
    bottom_hidden: tuple[PositiveInt, ...] = (64,)
    """Hidden widths of the MLP that turns the dense features into one more field."""
    hidden: Hidden = (256, 128)
    dropout: Dropout = 0.0


class FiBiNet(StrictConfig):
    """Squeeze-excitation weights of the fields, bilinear products, MLP on top."""

    kind: Literal["fibinet"] = "fibinet"
    bilinear: Literal["all", "each", "interaction"] = "all"
    """One product matrix for all pairs, one a field, or one a pair."""
    reduction: PositiveInt = 3
    """Fields over hidden units of the squeeze-excitation network."""
    hidden: Hidden = (256, 128)
    dropout: Dropout = 0.0


class AutoInt(StrictConfig):
    """Multi-head self-attention between the fields, beside an MLP."""

    kind: Literal["autoint"] = "autoint"
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 2
    head_dim: PositiveInt = 8
    hidden: Hidden = (256, 128)
    dropout: Dropout = 0.0
    """Dropout of the MLP."""


class MaskNet(StrictConfig):
    """Blocks that multiply the embeddings with instance-guided masks."""

    kind: Literal["masknet"] = "masknet"
    form: Literal["parallel", "serial"] = "parallel"
    """Blocks side by side on the embeddings, or each on the one before."""
    num_blocks: PositiveInt = 3
    block_dim: PositiveInt = 64
    """Outputs of a mask block."""
    reduction: PositiveInt = 2
    """Hidden width of a mask's network over its output width; the paper widens."""
    hidden: Hidden = (256, 128)
    """The MLP on the parallel blocks' outputs; the serial form has none."""
    dropout: Dropout = 0.0
    """Dropout of the MLP."""

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        fields = type(self).model_fields
        idle = [n for n in ("hidden", "dropout") if getattr(self, n) != fields[n].default]
        if self.form == "serial" and idle:
            raise ValueError(
                f"form=serial ends with its last block and has no MLP for {', '.join(idle)}; "
                "leave them out, or use form=parallel"
            )
        return self


class FinalMlp(StrictConfig):
    """Two gated MLPs fused bilinearly."""

    kind: Literal["final_mlp"] = "final_mlp"
    first_hidden: Hidden = (256, 128)
    second_hidden: Hidden = (256, 128)
    gate_hidden: PositiveInt = 64
    """Hidden width of the two feature gates."""
    num_heads: PositiveInt = 4
    """Blocks of the bilinear fusion."""
    dropout: Dropout = 0.0

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        first, second = self.first_hidden[-1], self.second_hidden[-1]
        if first % self.num_heads or second % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must divide the last widths of first_hidden ({first}) "
                f"and second_hidden ({second}); change one of them"
            )
        return self


Classifier = Annotated[
    LogisticRegression
    | Fm
    | Ffm
    | Dnn
    | WideDeep
    | DeepFm
    | Ccpm
    | Ipnn
    | Opnn
    | Pin
    | XDeepFm
    | DcnV2
    | Dlrm
    | FiBiNet
    | AutoInt
    | MaskNet
    | FinalMlp,
    Field(discriminator="kind"),
]

READ_ANY_DIMS = (LogisticRegression, Dnn, WideDeep, DcnV2, FinalMlp)
"""Classifiers that read all columns alike; the others combine fields of one common dim."""


def check_same_length(config: StrictConfig, names: tuple[str, ...]) -> None:
    """Refuse lists, one entry a layer each, of different or no length.

    Raises:
        ValueError: which lists, their lengths, and what to do.
    """
    lengths = {name: len(getattr(config, name)) for name in names}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        listed = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(
            f"{', '.join(names)} hold one entry a layer, but {listed}; give all of them the same "
            "number of entries, at least one"
        )
