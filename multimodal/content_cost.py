"""What the content encoder and its contrastive loss cost in a step, as data. Nothing heavy."""

from pydantic import NonNegativeFloat, NonNegativeInt

from embedding.config import StrictConfig


class EncoderCost(StrictConfig):
    """The encoder with its upper layers, where it runs; flops, seconds and bytes are one item's."""

    forward_flops: NonNegativeFloat
    backward_flops: NonNegativeFloat
    """Without computing the forward pass again, as micro batches do."""
    forward_operations: NonNegativeInt
    """Kernels that one pass starts, however many items it encodes."""
    backward_operations: NonNegativeInt
    forward_s: NonNegativeFloat
    """Measured on one core of the machine that plans."""
    backward_s: NonNegativeFloat
    activation_bytes: NonNegativeFloat
    """The most that is alive at once from the tokens to the end of backward."""
    token_bytes: NonNegativeFloat
    """Stored tokens, at their greatest length."""
    weight_bytes: NonNegativeInt
    """Of the whole encoder."""
    parameters: NonNegativeInt
    """Trained values of towers and fusion, whose gradients are added up."""
    fused_width: NonNegativeInt
    """Values of an item that the last layer reads, and that the bank holds."""
    head_s: NonNegativeFloat
    """Of the last layer, forward and backward in float32, measured on one core."""


class CicCost(StrictConfig):
    """The contrastive loss of a rank's distinct candidates, forward and backward."""

    flops_per_item: NonNegativeFloat
    flops_per_pair: NonNegativeFloat
    """Of each of the items' ordered pairs: there are as many as items squared."""
    bytes_per_item: NonNegativeFloat
    bytes_per_pair: NonNegativeFloat
    operations: NonNegativeInt
    cpu_s_per_flop: NonNegativeFloat
    """Measured on one core of the machine that plans."""
    parameters: NonNegativeInt

    def flops(self, num_items: float) -> float:
        """Of a step."""
        return num_items * (self.flops_per_item + num_items * self.flops_per_pair)

    def peak_bytes(self, num_items: float) -> float:
        """Of a step."""
        return num_items * (self.bytes_per_item + num_items * self.bytes_per_pair)
