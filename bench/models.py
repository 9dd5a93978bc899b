"""Parameter lists of real models, in the order in which their optimizer sees them."""

from __future__ import annotations

from collections.abc import Callable

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]


def resnet50() -> Shapes:
    """K. He et al. 2016, with the stride in the 3x3 convolutions, as torchvision has it: 161 tensors, 25.6 million."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            outer = 4 * planes
            for convolution in ((planes, width, 1, 1), (planes, planes, 3, 3), (outer, planes, 1, 1)):
                shapes += [convolution, *_norm(convolution[0])]
            if block == 0:
                shapes += [(outer, width, 1, 1), *_norm(outer)]
            width = outer
    return (*shapes, *_linear(1000, width))


def vit_large() -> Shapes:
    """ViT-L/16 at 224 pixels, A. Dosovitskiy et al. 2021: 296 tensors, 304 million."""
    width = 1024
    layer = (
        *_norm(width),
        *_linear(3 * width, width),
        *_linear(width, width),
        *_norm(width),
        *_linear(4 * width, width),
        *_linear(width, 4 * width),
    )
    patches = ((1, 1, width), (width, 3, 16, 16), (width,), (1, 197, width))
    return (*patches, *layer * 24, *_norm(width), *_linear(1000, width))


def gpt2() -> Shapes:
    """GPT-2 small, A. Radford et al. 2019, the output tied to the embedding: 148 tensors, 124 million."""
    width = 768
    layer = (
        *_norm(width),
        *((width, 3 * width), (3 * width,)),
        *((width, width), (width,)),
        *_norm(width),
        *((width, 4 * width), (4 * width,)),
        *((4 * width, width), (width,)),
    )
    return ((50257, width), (1024, width), *layer * 12, *_norm(width))


def llama_7b() -> Shapes:
    """Llama 7B, H. Touvron et al. 2023: 291 tensors, 6.7 billion."""
    width, hidden, vocabulary = 4096, 11008, 32000
    attention = ((width, width),) * 4
    layer = (*attention, (hidden, width), (width, hidden), (hidden, width), (width,), (width,))
    return ((vocabulary, width), *layer * 32, (width,), (vocabulary, width))


def _linear(outputs: int, inputs: int) -> Shapes:
    return (outputs, inputs), (outputs,)


def _norm(width: int) -> Shapes:
    return (width,), (width,)


MODELS: dict[str, Callable[[], Shapes]] = {
    "ResNet-50": resnet50,
    "ViT-L": vit_large,
    "GPT-2": gpt2,
    "Llama-7B": llama_7b,
}


def scaled(shapes: Shapes, divisor: int) -> Shapes:
    """As many tensors, every dimension above 16 divided: what fits the memory."""
    return tuple(tuple(-(-n // divisor) if n > 16 else n for n in shape) for shape in shapes)
