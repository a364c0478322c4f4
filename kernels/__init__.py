"""Ops with one contract and several backends; the torch reference defines the result.

Knows tensors only: no model, no data set, no file. Installed as ``spt_fast.kernels``.
"""

# Where a checkout is the working directory, libraries that look for Hugging Face's package "kernels" (transformers, and
# so peft) find this folder and import it. Ops that are defined twice crash whoever holds the first definition: under
# any other name this is an empty package.
if __name__ == "spt_fast.kernels":
    from .attention import prompt_attention, prompt_attention_packed
    from .availability import available_backends, unavailable_backends
    from .backends import BackendError
    from .kmeans import KMeansStep, kmeans_assign, kmeans_step

    __all__ = [
        "BackendError",
        "KMeansStep",
        "available_backends",
        "kmeans_assign",
        "kmeans_step",
        "prompt_attention",
        "prompt_attention_packed",
        "unavailable_backends",
    ]
