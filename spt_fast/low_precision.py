"""Frozen Linear layers with 8-bit weights, whose products run in 8 bits too, forwards and backwards.

torchao quantises the weights, one scale per output channel. It does not train through its dynamically quantised layers,
hence the two products here: of the activations with the weight, and of the gradient with its transpose. There is no
third: a frozen weight has no gradient.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spt_fast.errors import InputError, UnsupportedModelError

WeightDtype = Literal["int8", "float8"]
# Kernels for 8-bit products take rows and columns in multiples of this.
ALIGNMENT = 16
# torch's int8 product on CUDA refuses fewer rows than this.
FEWEST_ROWS = 17
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@functools.cache
def why_not(weight_dtype: WeightDtype, device: torch.device) -> str | None:
    """Why products with weights of ``weight_dtype`` cannot run on ``device``, or ``None``."""
    if device.type == "cuda":
        needed = (8, 9) if weight_dtype == "float8" else (7, 5)
        if torch.version.hip is not None:
            return "they are not supported on AMD devices"
        if torch.cuda.get_device_capability(device) < needed:
            name = torch.cuda.get_device_name(device)
            return (
                f"they need compute capability {needed[0]}.{needed[1]} or newer, which {name} does not have"
            )
        return None
    if weight_dtype == "float8":
        return f"they need a CUDA device of compute capability 8.9 or newer, not {device.type}"
    if device.type != "cpu":
        return f"they need a CPU or a CUDA device, not {device.type}"
    capabilities = torch.cpu.get_capabilities()
    exact = ("amx_int8", "avx512_vnni", "avx_vnni")
    # Without these instructions x86 adds pairs of products in 16 bits, which saturate: the results are wrong.
    if capabilities.get("architecture") == "x86_64" and not any(capabilities.get(name) for name in exact):
        return "this CPU cannot add up int8 products exactly (it has none of AMX, AVX512-VNNI and AVX-VNNI)"
    return None


def check_weight_dtype(weight_dtype: WeightDtype, *devices: torch.device) -> None:
    """Raise unless a backbone can have weights of ``weight_dtype`` here.

    Args:
        weight_dtype: ``"int8"`` or ``"float8"``.
        *devices: where it is to run, any of them; none given: the devices of this machine.

    Raises:
        InputError: another ``weight_dtype``, torchao is not installed, or no device can run it; the message says why.
    """
    if weight_dtype not in get_args(WeightDtype):
        raise InputError(
            f"weight_dtype must be None or one of {', '.join(get_args(WeightDtype))}, got {weight_dtype!r}"
        )
    _torchao_quantization()
    if not devices:
        cuda = range(torch.cuda.device_count())
        devices = (torch.device("cpu"), *(torch.device("cuda", index) for index in cuda))
    reasons = [why_not(weight_dtype, device) for device in devices]
    if None not in reasons:
        raise InputError(
            f"weight_dtype={weight_dtype!r}: {weight_dtype} products cannot run here: {reasons[-1]}; without "
            "weight_dtype the weights keep their own precision"
        )


def quantize_blocks(model: Any, weight_dtype: WeightDtype) -> None:
    """Replace every Linear layer in the blocks of ``model`` by an :class:`EightBitLinear`.

    Patch embedding, norms, position embedding and classifier keep their precision: they are a few percent of the
    weights, and their rounding would enter every block.

    Args:
        model: a timm ``VisionTransformer`` with float weights.
        weight_dtype: ``"int8"`` or ``"float8"`` (e4m3).

    Raises:
        InputError: see :func:`check_weight_dtype`.
        UnsupportedModelError: a layer has a width that is no multiple of 16.
    """
    check_weight_dtype(weight_dtype)
    layers = {name: layer for name, layer in model.blocks.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in layers.items():
        if layer.in_features % ALIGNMENT or layer.out_features % ALIGNMENT:
            raise UnsupportedModelError(
                f"weight_dtype={weight_dtype!r} needs layers whose widths are multiples of {ALIGNMENT}, and blocks."
                f"{name} is {layer.in_features} to {layer.out_features}"
            )
    for name, layer in layers.items():
        model.blocks.set_submodule(name, EightBitLinear(layer, weight_dtype))


class EightBitLinear(nn.Module):
    """A frozen ``nn.Linear`` with an 8-bit weight and a scale for every output.

    ``forward`` quantises every row of its input to 8 bits, multiplies in 8 bits, and answers in the dtype of the input
    (of autocast, where that is on). The gradient with respect to the input is computed in the same way. ``.to(dtype)``
    casts the bias alone.

    Args:
        layer: ``nn.Linear(K, N)`` with float weights; left as it is.
        weight_dtype: ``"int8"`` or ``"float8"``.

    Attributes:
        weight: ``[N, K]``, the 8-bit numbers; int8, or the bits of float8 as uint8, which no ``.to(dtype)`` touches.
        scale_bits: int32 ``[N, 1]``, the bits of :attr:`scale`, for the same reason.
        bias: ``[N]`` or ``None``.
        original_entries: :func:`entries` of the weight before it was quantised.

    Example:
        >>> layer = EightBitLinear(nn.Linear(32, 16), "int8")
        >>> layer.numbers.dtype, layer.scale.shape
        (torch.int8, torch.Size([16, 1]))
    """

    def __init__(self, layer: nn.Linear, weight_dtype: WeightDtype) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.original_entries = entries(layer.weight)
        quantized = _quantize(layer.weight.detach().float(), weight_dtype)
        bits = quantized.qdata if weight_dtype == "int8" else quantized.qdata.view(torch.uint8)
        scale = quantized.scale.reshape(-1, 1).float()
        # Parameters, as DistributedDataParallel sends buffers around in every step; plain tensors and none of torchao's
        # classes, which it cannot send at all.
        self.weight = nn.Parameter(bits, requires_grad=False)
        self.scale_bits = nn.Parameter(scale.view(torch.int32), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)

    @property
    def weight_dtype(self) -> WeightDtype:
        """``"int8"`` or ``"float8"``."""
        return "int8" if self.weight.dtype == torch.int8 else "float8"

    @property
    def numbers(self) -> Tensor:
        """``[N, K]``, int8 or float8 (e4m3): the weight is ``numbers * scale``."""
        return self.weight if self.weight_dtype == "int8" else self.weight.view(torch.float8_e4m3fn)

    @property
    def scale(self) -> Tensor:
        """Float32 ``[N, 1]``, one for every output."""
        return self.scale_bits.view(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """``[.., K]`` to ``[.., N]``.

        Raises:
            UnsupportedModelError: ``x`` is on a device that cannot run the products.
        """
        return linear_rows(self, x, 0, self.out_features)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, weight_dtype={self.weight_dtype}"


def linear_rows(layer: nn.Linear | EightBitLinear, x: Tensor, start: int, stop: int) -> Tensor:
    """Some of the outputs of a layer: ``layer(x)[..., start:stop]``, without computing the others.

    Args:
        layer: a plain or an 8-bit layer ``K`` to ``N``.
        x: ``[.., K]``.
        start: the first output.
        stop: one after the last.

    Returns:
        ``[.., stop - start]``.

    Raises:
        UnsupportedModelError: an 8-bit layer, and ``x`` is on a device that cannot run its products.

    Example:
        >>> layer = nn.Linear(8, 6)
        >>> linear_rows(layer, torch.randn(5, 8), 2, 6).shape
        torch.Size([5, 4])
    """
    bias = None if layer.bias is None else layer.bias[start:stop]
    if not isinstance(layer, EightBitLinear):
        return F.linear(x, layer.weight[start:stop], bias)
    _check_device(layer.weight_dtype, x.device)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    out = _EightBitProduct.apply(x, layer.numbers[start:stop], layer.scale[start:stop])
    return (out if bias is None else out + bias).to(x.dtype)


def entries(weight: Tensor, count: int = 4096) -> Tensor:
    """Up to ``count`` evenly spaced entries of a weight, rounded to bfloat16: what a backbone is recognised by.

    Returns:
        int16 (the bits), on the CPU.
    """
    flat = weight.detach().flatten()
    step = max(1, -(-flat.numel() // count))
    return flat[::step].to(torch.bfloat16).view(torch.int16).cpu()


def entries_by_name(model: nn.Module) -> dict[str, Tensor]:
    """:func:`entries` of every weight of ``model`` by its name; of 8-bit weights, as they were before."""
    originals = {
        name: layer.original_entries
        for name, layer in model.named_modules()
        if isinstance(layer, EightBitLinear)
    }
    found = {}
    for key, value in model.state_dict().items():
        layer, _, kind = key.rpartition(".")
        if layer not in originals or kind == "bias":
            found[key] = entries(value)
        elif kind == "weight":
            found[key] = originals[layer]
    return found


class _EightBitProduct(torch.autograd.Function):
    """``x @ (scale * weight).T`` for a frozen weight ``[N, K]``; only ``x`` has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.dtype = x.dtype
        # Not cast to the dtype of x here: torch.compile of torch 2.11 loses the gradient of a forward that ends in a
        # cast to the dtype its result has already.
        return _product(x, weight.t(), scale.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        # The scales lie along the axis that is summed over now: they go into the gradient before it is quantised, so
        # that the same 8-bit weight serves both ways.
        scaled = grad * scale.flatten()
        # Tensor cores want the axis of the sum to be contiguous; a copy of bytes costs little next to the product.
        transposed = weight.t().contiguous().t()
        return _product(scaled, transposed, scale.new_ones(1, weight.shape[1])).to(ctx.dtype), None, None


def _product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """``x [.., K] @ weight [K, N] * scale [1, N]``, each row of ``x`` quantised to the dtype of ``weight``; float32, or
    bfloat16 for float8."""
    rows = x.reshape(-1, x.shape[-1]).float()
    is_int8 = weight.dtype == torch.int8
    largest = 127.0 if is_int8 else torch.finfo(weight.dtype).max
    row_scale = (rows.abs().amax(dim=1, keepdim=True) / largest).clamp(min=SMALLEST_SCALE)
    # Dividing by a rounded scale may end a little above the largest value, which float8 turns into NaN.
    rows = (rows / row_scale).clamp(-largest, largest)
    if is_int8:
        quantized = rows.round().to(torch.int8)
        missing = FEWEST_ROWS - len(quantized)
        if x.is_cuda and missing > 0:
            quantized = F.pad(quantized, (0, 0, 0, missing))
        out = torch._int_mm(quantized, weight)[: len(rows)].float() * row_scale * scale
    else:
        # Row by row scaled products are rounded to bfloat16 by the kernel, finer than float8 rounded what went in.
        out = torch._scaled_mm(
            rows.to(weight.dtype),
            weight,
            scale_a=row_scale,
            scale_b=scale.contiguous(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    return out.unflatten(0, x.shape[:-1])


@torch.compiler.assume_constant_result
def _check_device(weight_dtype: WeightDtype, device: torch.device) -> None:
    reason = why_not(weight_dtype, device)
    if reason is not None:
        raise UnsupportedModelError(
            f"this backbone has {weight_dtype} weights, and {weight_dtype} products cannot run on {device}: {reason}"
        )


def _quantize(weight: Tensor, weight_dtype: WeightDtype) -> Any:
    """torchao's tensor of a float32 weight ``[N, K]``, with one scale for each of the N rows."""
    quantization = _torchao_quantization()
    # Otherwise torchao changes inductor's settings for the whole process.
    common: dict[str, Any] = {"set_inductor_config": False, "version": 2}
    if weight_dtype == "int8":
        config = quantization.Int8WeightOnlyConfig(granularity=quantization.PerRow(), **common)
    else:
        config = quantization.Float8WeightOnlyConfig(weight_dtype=torch.float8_e4m3fn, **common)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    quantization.quantize_(layer, config)
    return layer.weight


def _torchao_quantization() -> Any:
    try:
        import torchao.quantization
    except ImportError as error:
        raise InputError(
            "8-bit weights need torchao, which is not installed: pip install spt-fast[low-precision]"
        ) from error
    return torchao.quantization
