"""Describe the results of the benchmarks for docs/benchmarks.md: what is compared, the tables, and how to read them.

Each section has a function that takes a file of results and returns paragraphs, tables and pictures. The texts here
hold no figure: all figures come from the results. `make_page.py` makes the page of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from balancing import MEASURES
from experts_lines import MEMORY
from experts_lines import row as row_of_experts
from experts_lines import tables as tables_of_experts
from page_sections_of_kernels import (
    Figures,
    compiled_kernels,
    predicted_kernels,
    routing,
    routing_on_gpu,
    table,
)

GOLDEN = {
    "v1-mha": "`deepseek`, multi-head",
    "v1-gqa-norm": "`deepseek`, grouped-query, normalised",
    "v2-lite": "`deepseek_v2`, greedy",
    "v2-group-limited": "`deepseek_v2`, group-limited",
    "v3-noaux": "`deepseek_v3`",
}
LORA_WAYS = {"base": "frozen base", "peft": "plain PEFT", "ours": "this package"}
ROUTER_STD_COLUMNS = {
    "router_std 0.02": "router_std 0.02",
    "router_std 0.1": "router_std 0.1",
    "router_std 0.3": "router_std 0.3 (the default)",
    "dense": "the dense model itself",
}


def official_checkpoints(figures: Figures) -> list[str]:
    """Describe the comparison with the official code, and resumed runs."""
    theirs, ours = (figures["sides"][side] for side in ("transformers", "modeling_deepseekmoe"))

    def cells(kind: str, name: str) -> list[str]:
        shown = []
        for value in (theirs[kind][name], ours[kind][name]):
            shown.append(value.split(" (")[0] if isinstance(value, str) else f"{value:.1e}" if value else "0")
        return shown

    header = ("checkpoint", "max logit difference: transformers", "this package",
              "experts after resuming: transformers", "this package")  # fmt: skip
    imports = figures["import"]
    return [
        """The tiny official checkpoints of `tests/data/golden` are loaded by this package and by transformers.
        Their logits are compared with those of the official code. Then a Trainer run is interrupted and resumed,
        and its routed experts are compared with those of a run without an interruption.""",
        table(header, ((name, *cells("logits", key), *cells("resumed", key)) for key, name in GOLDEN.items())),
        """How to read it: differences of the logits are rounding. After resuming, 0 means that the run goes on bit
        for bit. transformers' own V2 and V3 models save per-expert tensors that Trainer does not put back: the run
        goes on with the experts of a new model.""",
        f"""Importing the package takes {imports["median_ratio"]:.2f} times as long as `import transformers, torch`
        (median of {imports["runs"]} pairs).""",
    ]


def sharded_training(figures: Figures) -> list[str]:
    """Describe the memory of loading and training, in one process and sharded."""
    header = ("method", "ranks", "while loading", "loaded", "while training", "of one process", "resident", "planned",
              "off")  # fmt: skip

    def cells(row: Figures) -> list[str]:
        loading, loaded, training, resident, planned = (
            f"{row[key] / 1e9:.2f}" for key in ("loading", "loaded", "training", "resident", "planned")
        )
        return [row["method"], str(row["ranks"]), loading, loaded, training, f"{row['share']:.0%}",
                f"{resident} ({row['resident_share']:.0%})", planned, f"{row['off']:+.0%}"]  # fmt: skip

    batch, length = figures["tokens"]
    return [
        f"""A model of {figures["parameters"]:,} parameters in float32 is loaded and trained by AdamW: in one
        process, and in {max(row["ranks"] for row in figures["cases"])} that FSDP2 shards it over while it is
        loaded; with all parameters, and with LoRA on attention, shared and routed experts; in one process also with
        LoRA on routed experts in nf4 (qlora). A rank's step has {batch} sequences of {length} tokens. All columns of
        memory are in GB.""",
        table(header, map(cells, figures["cases"])),
        """How to read it: "while loading" and "while training" are peaks of a rank's anonymous memory, "loaded"
        what it has in between; that of the libraries is taken off, and what is free is given back at once
        (MALLOC_MMAP_THRESHOLD_), without which glibc keeps 0.2 to 0.6 GB. While training, frozen weights that stay
        mapped from the files are included. "of one process" compares that peak with the one of a single process.
        "resident" is all resident memory, every page of the files included, again with its share of one process.
        "planned" is what `deepseekmoe inspect --gpus` predicts, and "off" how far that is from the measured peak.""",
    ]


def balancing(figures: Figures) -> list[str]:
    """Describe how balanced, and how good, models are after training with every method."""
    model, training = figures["model"], figures["training"]
    dense = model["first_k_dense_replace"]

    def cells(row: Figures) -> list[str]:
        shown = [row["method"]]
        for key, digits in MEASURES.items():
            mean, low, high = (f"{row[key][part]:.{digits}f}" for part in ("mean", "min", "max"))
            shown.append(f"{mean} ({low} to {high})")
        return shown

    return [
        f"""A model is trained from scratch with each way to balance its experts, on the docstrings of Python's
        standard library and the pages of its language reference. It has {figures["parameters"] / 1e6:.1f} M
        parameters, {dense} dense and {model["num_hidden_layers"] - dense} MoE layers, {model["n_shared_experts"]}
        shared and {model["n_routed_experts"]} routed experts, top-{model["num_experts_per_tok"]}. Each run trains
        on {figures["training_tokens"] / 1e6:.2f} M tokens in {training["steps"]} steps; the corpus holds
        {figures["corpus_tokens"] / 1e6:.2f} M. All methods have the same sigmoid gate, data order and schedule, and
        for a seed the same initial weights. All runs together took {figures["minutes"]:.0f} minutes beside other
        work. The table has the mean and the range of {figures["seeds"]} seeds.""",
        table(
            ("", "validation perplexity", "MaxVio_global", "MaxVio_batch", "its last fifth"),
            map(cells, figures["rows"]),
        ),
        """How to read it: MaxVio is the load of the busiest expert over the mean load, minus 1; 0 is balanced.
        MaxVio_global is that of the whole validation set, MaxVio_batch that of a training batch, on average. A
        method is better if both the perplexity and MaxVio are lower. At this size the perplexities of all methods
        overlap; the balance does not.""",
        figures["verdict"],
        "![MaxVio of the training batches, by method](images/balancing.png)",
    ]


def balancing_overhead(figures: Figures) -> list[str]:
    """Describe what balancing costs in time."""
    config, (batch, length) = figures["config"], figures["batch"]
    subjects = {"this package": figures, "transformers' DeepSeek-V3, counted by hooks": figures.get("native")}
    rows = [
        (f"{title}, {name}", f"{100 * (ratio - 1):+.1f}%")
        for title, found in subjects.items()
        if found is not None
        for name, ratio in (
            ("counting", found["ratio_to_nothing"]["counting"]),
            ("counting, statistics, update and log", found["ratio_to_nothing"]["balancing"]),
            ("callback on over callback off", found["callback_on_over_off"]),
        )
    ]
    return [
        f"""What counting the tokens of every expert, the statistics and the update of the bias cost, as a share of
        a training step of {figures["seconds"]["nothing"]:.1f} s with AdamW: {config["num_hidden_layers"]} layers,
        hidden {config["hidden_size"]}, {config["n_routed_experts"]} experts, {batch * length} tokens. The ways take
        turns in blocks of steps; medians of the ratios of neighbouring blocks.""",
        table(("", "over a step without any records"), rows),
        """How to read it: 0% would mean that it costs nothing. The differences between the rows are noise. Not
        measured on a GPU.""",
    ]


def experts(figures: Figures) -> list[str]:
    """Describe the speed and the memory of the experts alone, and of whole models."""
    header = ("experts", "tokens", "", "eager", "batched_mm", "grouped_mm", "deepseekmoe",
              "times as fast as the best", "of the matrix peak")  # fmt: skip
    rounds = {case["shape"]["name"]: str(case["shape"]["rounds"]) for case in figures["cases"]}
    memory, model = figures.get("memory"), figures.get("model")

    def cells(row: Figures) -> list[str]:
        theirs, ours = row["bytes"]["grouped_mm"], row["bytes"]["deepseekmoe"]
        return [f"{row['shape']}, {row['tokens']} tokens, {MEMORY[row['kind']]}", f"{theirs / 1e6:.0f} MB",
                f"{ours / 1e6:.0f} MB", f"{ours / theirs:.0%}"]  # fmt: skip

    blocks = [
        f"""transformers' own DeepSeek-V3 experts, computed by every implementation. Medians of rounds in which all
        take turns, and so does a large matrix product, whose rate is the peak
        ({"; ".join(f"{name}: {number} rounds" for name, number in rounds.items())}). A frozen step has gradients of
        the hidden states and the gate's weights alone. eager is left out of full steps, where it is many times
        slower.""",
    ]
    for title, cases in tables_of_experts(figures["cases"]).items():
        blocks += [f"In {title}:", "\n".join([table(header, ()), *map(row_of_experts, cases)])]
    blocks.append("""How to read it: "times as fast as the best" compares `deepseekmoe` with the fastest of
        transformers' own implementations, which stands in parentheses; above 1 `deepseekmoe` is faster. The last
        column is how close it comes to a plain matrix product, in float32 where the CPU has no instructions for
        bfloat16. A decoded token reads weights rather than computing, so weights read in a second stand there
        instead. How fast eager is depends on what the process has freed before.""")
    if memory:
        blocks += [
            "What a layer needs beside its parameters, each way in a process of its own:",
            table(("memory of a layer", "grouped_mm", "deepseekmoe", "of grouped_mm's"), map(cells, memory)),
        ]
    if model:
        rates = (
            (kind, *(f"{found[way]:.0f}" for way in ("grouped_mm", "deepseekmoe"))) for kind, found in model.items()
        )
        blocks += [
            "A model of such layers, trained with all parameters and decoding one sequence:",
            table(("whole model, tokens a second", "grouped_mm", "deepseekmoe"), rates),
        ]
    return blocks


def experts_on_gpu(figures: Figures) -> list[str]:
    """Describe the speed and the memory of the experts on a GPU."""
    first, *rest = experts(figures)
    return [
        f"""{first} In bfloat16, with the tiles that this GPU's tuning has found; they are the rule for GPUs of its
        kind since 0.13.0.""",
        *rest,
        """With few tokens all ways wait for the host: batched_mm, which copies the chosen experts' weights, takes the
        fewest calls. In a CUDA graph that time goes away, and all backends can be captured.""",
    ]


def expert_lora(figures: Figures) -> list[str]:
    """Describe what LoRA on the experts costs."""

    def cells(case: Figures, way: str) -> list[str]:
        shape, seconds, ratios = case["shape"], case["seconds"], case["over_base"]
        name = (f"{shape['experts']} experts, top-{shape['top_k']}, width {shape['width']}, {shape['tokens']} tokens, "
                f"r {shape['rank']}")  # fmt: skip
        return [name if way == "base" else "", LORA_WAYS[way],
                f"{1e3 * seconds['step'][way]:.0f} ms ({ratios['step'][way]:.2f})",
                f"{1e3 * seconds['decode'][way]:.1f} ms ({ratios['decode'][way]:.2f})",
                f"{case['peak_bytes'][way] / 1e9:.2f} GB"]  # fmt: skip

    first, alone = figures["cases"][0], figures.get("one_thread")
    of_one_thread = (
        f"On one thread, the step of the first case is {alone['peft_over_ours']['step']:.1f} times faster."
        if alone
        else ""
    )
    shape, faster = first["shape"], first["peft_over_ours"]
    return [
        f"""LoRA on stacked experts by this package and by plain PEFT, over the frozen base model; {shape["dtype"]},
        {shape["layers"]} MoE layers, hidden {shape["hidden"]}. The three take turns in each round; medians. The
        step is forward and backward, down to the input embeddings. Not measured on a GPU.""",
        table(
            ("", "", "training step", "one-token decode", "peak memory of a step"),
            (cells(case, way) for case in figures["cases"] for way in LORA_WAYS),
        ),
        f"""How to read it: in parentheses stands the time over that of the frozen base; 1.00 would mean that LoRA
        costs nothing. In the first case the step is {faster["step"]:.1f} times and the decode
        {faster["decode"]:.0f} times faster than with plain PEFT, and the extra memory over the base is
        {first["extra_memory_of_peft"]:.1%} of that of plain PEFT. {of_one_thread} A higher rank costs more, because
        the factors are larger.""",
    ]


def quantised_experts(figures: Figures) -> list[str]:
    """Describe the memory and the speed of LoRA over quantised experts."""
    speed = figures["speed"]

    def sizes(way: str, row: Figures) -> list[str]:
        loaded, loading, peak = (f"{row[key] / 1e9:.2f} GB" for key in ("loaded", "peak_of_loading", "peak"))
        return [way, f"{row['bytes_a_weight']:.3f}", loaded, loading, peak, f"{row['over_bfloat16']:.2f}"]

    def times(way: str) -> list[str]:
        step, token = speed["step"][way], speed["decode"][way]
        return ["whole stacks decoded (nf4)" if way == "peer" else way,
                f"{step['seconds']:.2f} s", f"{step['over_float32']:.2f}",
                f"{1e3 * token['seconds']:,.0f} ms", f"{token['over_float32']:.2f}"]  # fmt: skip

    return [
        """MoE layers of the 16B's shape (64 experts, 2048 x 1408, top-6). First memory: 4 layers are loaded from a
        checkpoint in bfloat16 and take a LoRA step of 512 tokens with AdamW, each format in a process of its own.""",
        table(
            ("experts", "bytes a weight", "loaded", "peak of loading", "peak with a step", "of bfloat16's"),
            (sizes(way, row) for way, row in figures["memory"].items()),
        ),
        """Then time, of one layer in float32 with adapters of rank 16: a step, forward and backward, of 1,024
        tokens, and a decoded token. All ways take turns; medians.""",
        table(("experts", "step", "over float32", "token", "over float32"), map(times, speed["step"])),
        """How to read it: memory is anonymous memory, as the operating system counts it, without the pages of the
        files. "over float32" is the median of the ratios of neighbours; 1.00 would mean that decoding costs nothing.
        The last row is how other tools quantise a parameter: it is decoded as a whole whenever it is read, here by
        torch's parametrisation with PEFT's way to merge.""",
    ]


def quantised_quality(figures: Figures) -> list[str]:
    """Describe what quantised experts cost in quality."""
    ways, base = figures["ways"], figures["ways"]["float32"]

    def cells(way: str, row: Figures) -> list[str]:
        before, after = (f"{row[key]:.3f} ({row[key] / base[key] - 1:+.2%})" for key in ("before", "after"))
        return [way, before, f"{row['same_first_token']:.1%}", after]

    return [
        f"""The demo's model, SmolLM2-135M-Instruct as a mixture, with its experts in every format, on held-out pages
        of Python's language reference: as it is loaded, and after {figures["steps"]} of the demo's LoRA steps over
        these experts, the same for all. "Corrected" is what
        [`correct_rounding`](quantized-experts.md#give-back-what-rounding-took) makes of them, with rank 32.""",
        table(
            ("experts", "perplexity", "most probable token as float32's", "perplexity after LoRA"),
            (cells(way, row) for way, row in ways.items()),
        ),
        "How to read it: in parentheses stands the difference to float32's. Lower is better.",
    ]


def mtp_table(figures: Figures) -> str:
    """Make the table of generation with drafts."""

    def cells(way: str, row: Figures) -> list[str]:
        shares = row["acceptance"] or []
        return [
            way,
            f"{row['tokens_per_second']:.1f}",
            f"{row['times_as_fast']:.2f}",
            ", ".join(f"{one:.0%}" for one in shares) or "-",
            f"{row['same_text']} of {figures['prompts']}",
        ]

    return table(
        ("greedy, batch of one", "tokens a second", "times as fast", "accepted", "same text"),
        (cells(way, row) for way, row in figures["ways"].items()),
    )


def mtp(figures: Figures) -> list[str]:
    """Describe what drafts of multi-token prediction bring."""
    batch = figures["batch"]
    return [
        f"""The demo's model with the drafter of `examples/train_drafter.py`, float32: {figures["prompts"]} prompts of
        {figures["prompt_tokens"]} tokens from held-out pages of Python's language reference, each continued by
        {figures["new_tokens"]} tokens. The dense model is the one that the demo started from.""",
        mtp_table(figures),
        f"""How to read it: "accepted" is the share of the steps in which draft 1, 2, ... was accepted. A batch of
        {batch["rows"]} rows, each of which accepts its own number of drafts, is {batch["times_as_fast"]:.2f} times as
        fast with one draft as without.""",
    ]


def conversion(figures: Figures) -> list[str]:
    """Describe the time and the memory of conversion and upcycling."""
    header = ("checkpoint", "conversion", "time", "`cp` of the source", "bytes written a second, of `cp`",
              "peak memory", "files mapped at once")  # fmt: skip
    rows = [
        (f"{result['gigabytes']:.2f} GB, {result['files']} files", name, f"{case['seconds']:.1f} s",
         f"{case['cp_seconds']:.1f} s", f"{case['of_cp']:.0%}", f"{case['rss_anon'] / 1e6:.0f} MB",
         str(case["mapped"]))
        for result in figures["results"] for name, case in result["cases"].items()
    ]  # fmt: skip
    upcycled = [
        (row["dialect"], f"{row['seconds']:.0f} s", f"{row['rss_anon'] / 1e6:.0f} MB",
         f"{row['max_logit_difference']:.1e}", "the same" if row["same_text"] else "not the same")
        for row in figures["upcycling"]
    ]  # fmt: skip
    return [
        f"""`deepseekmoe convert` on tensors with the shapes of DeepSeekMoE 16B in bfloat16, in a process of its
        own. `cp -r` of the source and the conversion take turns: medians of {figures["rounds"]} rounds, and one
        round where values are computed. The time includes the start of the command. Every result was verified
        against its source, value by value.""",
        table(header, rows),
        """How to read it: memory is the anonymous resident memory; it is nearly the same for both sizes. The speed
        is that of writing, as a share of that of `cp`. A layout change of the small checkpoint stays in the page
        cache, where `cp` needs less than a second; with the large one the disk decides.""",
        """Upcycling SmolLM2-135M with `deepseekmoe upcycle`, the check included. The result is loaded again as a
        user would, and compared with the dense model:""",
        table(("SmolLM2-135M to", "time", "peak memory", "largest logit difference", "greedy text"), upcycled),
    ]


def router_std(figures: Figures) -> list[str]:
    """Describe how fast an upcycled model learns."""
    found = {row["model"]: f"{row['perplexity']:.2f}" for row in figures["rows"]}
    return [
        f"""How fast an upcycled model learns depends on how far apart the rows of its router are drawn
        (`UpcyclingPlan.router_std`). SmolLM2-135M-Instruct is upcycled with several values, and trained for
        {figures["steps"]} steps of AdamW on Python's language reference; beside it, the dense model. The table has
        the held-out perplexity after training. Before, it was {found["before training"]}.""",
        table(list(ROUTER_STD_COLUMNS.values()), [[found[name] for name in ROUTER_STD_COLUMNS]]),
        "How to read it: lower is better. The closer to the dense model, the less upcycling slows down training.",
    ]


def demo(figures: Figures) -> list[str]:
    """Describe what the demo reaches."""
    rows = [
        ("dense against upcycled, max logit difference", f"{figures['dense_vs_upcycled_max_logit_difference']:.2e}"),
        ("dense against upcycled, greedy text",
         "the same" if figures["dense_vs_upcycled_same_greedy_text"] else "not the same"),
        (f"parameters trained, beside {figures['parameters']:,} frozen ones",
         f"{figures['trained_parameters']:,} ({figures['adapter_bytes'] / 1e6:.0f} MB)"),
        ("held-out perplexity, dense and upcycled",
         f"{figures['perplexity_dense']:.3f} and {figures['perplexity_before']:.3f}"),
        ("held-out perplexity after fine-tuning",
         f"{figures['perplexity_after']:.3f} ({figures['perplexity_gain']:.1%} lower)"),
        ("merged checkpoint in a fresh process against the adapter, max logit difference",
         f"{figures['merged_max_logit_difference']:.2e}"),
        ("time of the demo", f"{figures['seconds']:.0f} s"),
    ]  # fmt: skip
    return [
        f"""`make demo` upcycles a real dense model: {figures["model"]}. The result has {figures["experts"]}. LoRA on
        routed and shared experts is trained for {figures["optimizer_steps"]} steps on Python's language reference.
        Then the adapter is merged, and the result is loaded in a fresh process.""",
        table(("", ""), rows),
        """How to read it: upcycling and merging change logits by rounding only, and the perplexity on text that was
        not trained on falls.""",
    ]


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        title: its heading.
        results: the file of results, without its ending.
        script: what runs.
        describe: the function that describes the figures.
    """

    title: str
    results: str
    script: str
    describe: Callable[[Figures], list[str]]


SECTIONS = (
    Section(
        "Official checkpoints", "against_transformers", "benchmarks/against_transformers.py", official_checkpoints
    ),
    Section("The experts", "experts", "benchmarks/experts.py", experts),
    Section("The experts on a GPU", "gpu/experts_gpu", "benchmarks/experts.py", experts_on_gpu),
    Section("LoRA on the experts", "expert_lora", "benchmarks/expert_lora.py", expert_lora),
    Section("LoRA over quantised experts", "quantized_experts", "benchmarks/quantized_experts.py", quantised_experts),
    Section("Quality of quantised experts", "quantized_quality", "benchmarks/quantized_quality.py", quantised_quality),
    Section("Multi-token prediction", "mtp", "benchmarks/mtp.py", mtp),
    Section("Balancing", "balancing", "benchmarks/balancing.py", balancing),
    Section("What balancing costs", "balancing_overhead", "benchmarks/balancing_overhead.py", balancing_overhead),
    Section("Routing", "routing", "benchmarks/routing.py", routing),
    Section("Routing on a GPU", "gpu/routing_gpu", "benchmarks/routing.py", routing_on_gpu),
    Section("Compiled kernels", "compile_kernels", "benchmarks/compile_kernels.py", compiled_kernels),
    Section("Predicted times of kernels", "predict_kernels", "benchmarks/predict_kernels.py", predicted_kernels),
    Section("Memory of sharded training", "sharded_training", "benchmarks/sharded_training.py", sharded_training),
    Section("Conversion and upcycling", "conversion", "benchmarks/conversion.py", conversion),
    Section("How fast an upcycled model learns", "router_std", "benchmarks/router_std.py", router_std),
    Section("The demo", "demo", "examples/demo.py", demo),
)
