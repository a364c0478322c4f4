"""The numbers this project claims, and the files it bundles, each made by one command."""

# What `spt-fast bench` lists: the name of a module here with a typer app called `app`, and what it measures.
BENCHMARKS = {
    "kmeans": "One Lloyd iteration and time to convergence, against other k-means libraries.",
    "prototypes": "From images to prototypes: the paper's Table 1 again, beside its own times.",
    "attention": "prompt_attention, forward and backward, against torch's attention kernels.",
    "train_step": "A training step against naive VPT, no prompts, linear probe and full fine-tuning.",
    "scaling": "How time and memory grow with the tokens of a stream, and with processes.",
    "accuracy_speed": "Accuracy against seconds for every start of deep prompts.",
    "multi_task": "A batch of many tasks against one task alone and against a loop over tasks.",
    "low_precision": "What 8-bit frozen weights cost in accuracy and gain in time.",
    "data_path": "Images per second from JPEG files to normalised batches, against torchvision and Kornia.",
    "end_to_end": "From JPEG files on disk to a trained adapter, and what images add to the steps of training.",
    "large_model": "Memory and speed of a training step of ViT-H/14, with and without checkpoints.",
    "imagenet_stream": "Prototypes from a stream as long as ImageNet's, beside its forward passes alone.",
    "compare_starts": "Which start of prompts ends where, over learning rates and seeds.",
}
# The commands around them.
TOOLS = {
    "suite": "Every benchmark in one go, resumable.",
    "report": "Draw what the benchmarks measured.",
}
