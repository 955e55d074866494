"""The closing self-examination: the six questions of the checklist of the second article, and its table of scenarios.

    parts()          [(title, [question, …]), …], in the order of the checklist
    scenarios()      one question for each row of the table of scenarios

A question is a dict as `lab.quiz` takes it: question, {choice: why}, the right choice. What is a number is computed
from the package; tests/test_claims.py works every key out a second time. `minipeft.lab.exam()` shows and prints them.
"""

from __future__ import annotations

from functools import cache

from .findings import QV, SEVEN, adapters_add_products, bill, config, percent, total, trained
from .methods.adapters import BottleneckAdapter
from .methods.ia3 import IA3
from .methods.lora import LoRA
from .methods.prefix_tuning import PrefixTuning
from .methods.prompt_tuning import PromptTuning

SEVEN_B, EIGHT_B = "Llama 7B", "Llama 3 8B"


def _question(question: str, right: str, **others) -> dict:
    """right: (choice, why); others: the wrong ones, in `wrong`."""
    choice, why = right
    return {"question": question, "right": choice, "choices": {choice: why, **others["wrong"]}}


@cache
def parts() -> tuple[tuple[str, tuple[dict, ...]], ...]:
    """The checklist's six questions, each as a title and two questions or more; the last is the table of scenarios."""
    return (
        ("1. Hard and soft prompts: what is trained, and what is frozen", _prompts()),
        ("2. Prefix tuning: where its numbers sit, and why it can do more", _prefixes()),
        ("3. An adapter's architecture, and what its skip is for", _adapters()),
        ("4. Why adapters cost time and a merged LoRA does not", _latency()),
        ("5. What (IA)³ trains, how it acts, how small it is", _ia3()),
        ("6. The scenarios: which method, and why", scenarios()),
    )


def _prompts() -> tuple[dict, ...]:
    width, layers = config(EIGHT_B).hidden_size, config(EIGHT_B).num_hidden_layers
    count = trained(EIGHT_B, PromptTuning(20))
    return (
        _question("What is the difference between a hard prompt and a soft one?",
                  ("a hard prompt is words; a soft one is trained vectors that are no words", "The gradient moves the vectors; words cannot be moved a little."),
                  wrong={"a hard prompt is long, a soft one short": "Either can be of any length.",
                         "a hard prompt is trained, a soft one written": "The other way round.",
                         "a soft prompt is a hard one whose words the optimizer chose": "Its vectors stand for no word. Replaced by the nearest words, what was learned is gone: chapter 2 measures it."}),
        _question("During prompt tuning, which tensors require a gradient?",
                  ("the prompt alone", "One tensor, length × width. Everything else is frozen, the embedding table included."),
                  wrong={"the prompt and the embedding table": "The table is frozen. The prompt stands in front of what it gives.",
                         "the prompt and the first block": "The first block is frozen. It passes the gradient on to the prompt.",
                         "none: the prompt is found by search": "It is trained by gradient descent."}),
        _question(f"A prompt of 20 tokens in a model of width {width:,}. How many numbers train?",
                  (f"{count:,}", "Length × width, once, at the input."),
                  wrong={f"{layers * count:,}": f"That puts one into each of {layers} layers. A prompt stands only at the input.",
                         f"{20 * layers:,}": "Each token is a vector, not one number a layer.",
                         f"{width:,}": "That is one token."}),
    )


def _prefixes() -> tuple[dict, ...]:
    eight = config(EIGHT_B)
    n, layers, head = 10, eight.num_hidden_layers, eight.hidden_size // eight.num_attention_heads
    count = trained(EIGHT_B, PrefixTuning(n, reparameterize=False))
    wide = 2 * layers * eight.hidden_size * n
    return (
        _question("Into what does prefix tuning insert trained vectors?",
                  ("in front of the keys and the values, in every attention layer", "Queries stay those of the text. Each layer can attend to positions that no token wrote."),
                  wrong={"in front of the embeddings, once": "That is prompt tuning.",
                         "in front of queries, keys and values, in every layer": "A query asks for a position of the text; a prefix has none.",
                         "in front of the keys and the values, in the first layer": "In every layer. From the first alone it would act as a prompt does, through attention only.",
                         "behind each feed-forward": "That is where adapters sit."}),
        _question("Why can a prefix do more than a prompt of the same length?",
                  ("each layer is given its own vectors, not what earlier layers made of the input's", "A prompt's keys in layer 20 are what 19 frozen layers turn it into. A prefix sets them."),
                  wrong={"it changes the attention weights' matrices": "They are frozen. What is attended to changes.",
                         "it makes the text longer": "It does not. A prompt does; a prefix adds keys and values, at which nothing is computed.",
                         "its network stays in the model": "The network is dropped after training, and P-tuning v2 never had one."}),
        _question(f"A prefix of {n} positions in Llama-3-8B: {layers} layers, width {eight.hidden_size:,}, {eight.num_attention_heads} heads, "
                  f"{eight.num_key_value_heads} key/value heads of {head}. How many numbers train, without a network?",
                  (f"{count:,}", "2 × layers × key/value heads × their width × positions."),
                  wrong={f"{wide:,}": "That takes keys as wide as the model. Here four queries share a key.",
                         f"{count // 2:,}": "Keys or values. Both get a prefix.",
                         f"{n * eight.hidden_size:,}": "That is a prompt: at the input only."}),
    )


def _adapters() -> tuple[dict, ...]:
    one, both = BottleneckAdapter(64).parameter_count(768), trained("BERT-base", BottleneckAdapter(64))
    share, of = percent(both, total("BERT-base")), total("BERT-base")
    return (
        _question("Put the parts of an adapter in order.",
                  ("down-projection, nonlinearity, up-projection, addition of what came in", "d → m, σ, m → d, and the skip around all three."),
                  wrong={"up-projection, nonlinearity, down-projection, addition of what came in": "That is a feed-forward layer. An adapter is narrow in the middle.",
                         "down-projection, up-projection, nonlinearity, addition of what came in": "Then the two matrices are one of low rank, and the bend is at full width.",
                         "down-projection, nonlinearity, addition of what came in, up-projection": "The skip ends behind the up-projection: there it has the width of what came in.",
                         "down-projection, nonlinearity, up-projection": "The skip is missing."}),
        _question("Why does an adapter need its skip?",
                  ("with small weights it then begins as nearly the identity, and the frozen model keeps working", "Without it, what the frozen layers send on would be squeezed through m numbers and destroyed on the first step."),
                  wrong={"it makes the adapter smaller": "An addition has no numbers.",
                         "it lets the adapter be merged": "The nonlinearity prevents merging, skip or no skip.",
                         "without it there would be no gradient": "There would be one. But it would start from a broken model."}),
        _question("Adapters of 64, two in each of the 12 layers of BERT-base. Which share of the model's numbers is that?",
                  (f"{share:.1f} %", f"{both:,} of {of:,}."),
                  wrong={"3 to 4 %": f"In print, and wrong: that would be at least {0.03 * of:,.0f} numbers.",
                         f"{share / 2:.1f} %": "One a layer. Houlsby's placement has two.",
                         f"{percent(one, of):.2f} %": "That is one adapter."}),
    )


def _latency() -> tuple[dict, ...]:
    found = adapters_add_products(None).figures
    small, big = (found["two_a_block"] - found["bare"]) // 2, (found["one_a_block"] - found["bare"]) // 2
    W, A, B = 3, 2, -1
    merged = W + 2 * B * A
    return (
        _question("Why do adapters make a pass slower, although their arithmetic is about two percent of the model's?",
                  ("they come after a sub-layer and the next one waits for them; with few rows a small operator takes nearly as long as a large one", "Each adds operators to the chain in which each waits for the one before."),
                  wrong={"they double the width of the model": "They leave it as it is.",
                         "their weights must be read from disk": "They are in memory, as the base is.",
                         "they make the text longer": "A prompt does."}),
        _question("How many matrix products do two adapters add to the pass through one block?",
                  (f"{small}", "Down and up, twice."),
                  wrong={f"{big}": "That is one adapter.", "0": "They cannot be merged: a nonlinearity stands between the two matrices.",
                         "1": "Each adapter has two matrices, with a bend between them."}),
        _question("By what does LoRA come to add nothing after training?",
                  ("s B A is added to W: one matrix of the same shape, in the same product", "Wx + sBAx = (W + sBA)x: the update is linear in x, an adapter's is not."),
                  wrong={"A and B are so small that they are not noticed": "Unmerged they are noticed.",
                         "A and B are dropped once W has learned": "W is frozen. Dropped, what was learned is lost.",
                         "A and B run at the same time as W": "Unmerged they may, and still cost operators."}),
        _question(f"One number each: W = {W}, A = {A}, B = {B}, α = 4, r = 2. What is the merged weight?",
                  (f"{merged}", "W + (α/r) B A."),
                  wrong={f"{W + B * A}": "The scale α/r = 2 is missing.", f"{2 * (W + B * A)}": "The scale is on the update only.",
                         f"{W - 2 * B * A}": "The sign is wrong."}),
    )


def _ia3() -> tuple[dict, ...]:
    made = config(SEVEN_B)
    d, layers, inner = made.hidden_size, made.num_hidden_layers, made.intermediate_size
    ia3, lora = trained(SEVEN_B, IA3()), trained(SEVEN_B, QV)
    return (
        _question("What does (IA)³ train?",
                  ("three vectors a block, one number for each entry of keys, values and the feed-forward's inner activation", "They start at one, so that nothing changes."),
                  wrong={"two matrices of low rank a block": "That is LoRA.", "the biases": "That is BitFit.",
                         "one vector in front of the text": "That is a prompt of one token."}),
        _question("How do the vectors act in a forward pass?",
                  ("entry by entry, they multiply what the projections give", "Multiplied into the rows or columns of the projections, they cost nothing afterwards."),
                  wrong={"they are added": "Starting at one, that would change the model at once.",
                         "they replace the norm's weights": "The norms stay as they are.",
                         "they are put in front of keys and values": "That is a prefix."}),
        _question(f"A Llama of {layers} layers, width {d:,}, inner width {inner:,}. About how large is (IA)³ beside a LoRA of rank 8 on query and value?",
                  (f"1/{lora / ia3:.0f} of it", f"{ia3:,} and {lora:,}."),
                  wrong={"a thousandth of it": "It has a number for each channel in each layer; that adds up.",
                         "larger": "It has vectors, LoRA matrices: eight rows and eight columns each.",
                         "as large as a prompt of 20 tokens": f"That has {trained(SEVEN_B, PromptTuning(20)):,}; (IA)³ is as large as a prompt of {ia3 / d:.0f} tokens."}),
    )


@cache
def scenarios() -> tuple[dict, ...]:
    """One question for each row of the article's table; where its answer is wrong, the question is what is right."""
    gb = {way: bill("Llama 65B", way).total / 1e9 for way in ("LoRA", "QLoRA")}
    prompt, ia3, lora = (trained(SEVEN_B, method) for method in (PromptTuning(20), IA3(), LoRA(rank=1)))
    many = 100 * trained(SEVEN_B, SEVEN) * 2 / 1e9
    return (
        _question("Ordinary instruction tuning, one task, a GPU that holds the model in 16 bits. Where do you begin?",
                  ("LoRA of rank 8 to 16, merged afterwards", "Good quality for the memory, no cost at inference. More rank, or all linear layers, if the data ask for it."),
                  wrong={"full fine-tuning": "It may come, if LoRA is not enough. It needs several times the memory.",
                         "a soft prompt": "It depends on its start and its rate, and learns slowly on small models.",
                         "QLoRA": "The model fits in 16 bits: four would cost time, and a little quality."}),
        _question("A model of 65 billion numbers and one card of 48 GB. What fits?",
                  ("QLoRA", f"{gb['QLoRA']:.0f} GB with one row of 512 tokens."),
                  wrong={"LoRA on a 16-bit base": f"{gb['LoRA']:.0f} GB: the frozen base is in 16 bits.",
                         "(IA)³ on a 16-bit base": "It trains less than LoRA, but the base alone is too large.",
                         "nothing": "QLoRA does. On 24 GB, nothing does: there the weights alone are too many."}),
        _question("You reach the model through an API that takes and returns text. What can you do?",
                  ("write hard prompts", "Words are all that goes in."),
                  wrong={"prompt tuning": "In print, and wrong: it sends vectors in and needs a gradient back.",
                         "prefix tuning": "It needs the keys and values inside.",
                         "LoRA, unmerged": "It needs the weights' inputs and outputs. (Some services train one for you; then they have the weights, not you.)"}),
        _question("The fewest trained numbers on a 7B Llama: which of these?",
                  ("a prompt of 20 tokens", f"{prompt:,}."),
                  wrong={"(IA)³": f"In print, and wrong: {ia3:,}. It is a good choice where examples are few, and it can be merged.",
                         "LoRA of rank 1 on query and value": f"{lora:,}.",
                         "LoRA of rank 8 on query and value": f"{trained(SEVEN_B, QV):,}."}),
        _question("A hundred tasks on one base, chosen anew for each request. What do you serve?",
                  ("one base, with LoRAs unmerged beside it", f"A hundred of rank 16 on all linears are {many:.0f} GB in 16 bits, once each. A batch may mix them: chapter 10."),
                  wrong={"a hundred merged models": "Each is a whole model.",
                         "one model with all LoRAs merged": "Their updates would add up, and each task would get all of them.",
                         "one base, merging the wanted LoRA for each request": "A merge touches every weight; two requests for different tasks could not share a batch."}),
        _question("Only quality counts, there is much new data, a new language, and memory is no question. What do you try?",
                  ("full fine-tuning, beside LoRA of high rank on all linear layers", "With much to learn, full fine-tuning is ahead; whether it is for your data you know after comparing."),
                  wrong={"(IA)³": "It scales what is there; it has no room for a language.",
                         "a soft prompt, for it keeps the model as it is": "It keeps it so well that there is little room to learn.",
                         "LoRA of rank 8 on query and value only": "Its numbers may be too few for so much data. More rank and more layers come first."}),
    )
