# Code of the tutorial, cell by cell; the words of each language stand in tutorial.<language>.md.
# Labels between double braces come from the head of that file.

# %% setup
import logging
import math
import os
import random
import time
import warnings

os.environ["TQDM_DISABLE"] = "1"
warnings.filterwarnings("ignore")

import matplotlib.pyplot as plt
import pandas as pd
import psutil
import torch
from kvbench import KVCacheBenchmark, embedded_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

logging.getLogger("transformers").setLevel(logging.ERROR)
torch.set_num_threads(2)
folder = embedded_model()
model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
print(f"{model.num_parameters():,} {{ parameters }}, {model.config.num_hidden_layers} {{ layers }}")

# %% prompt
messages = [
    {"role": "system", "content": "You are the claims assistant of an insurance company."},
    {"role": "user", "content": "Hello, I had a car accident yesterday. How do I file a claim?"},
]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
print(ids.shape[1], "{{ prompt_tokens }}")

# %% by_hand
with torch.inference_mode():
    first = model(ids, use_cache=True)
    token = first.logits[:, -1].argmax(-1, keepdim=True)
    # {{ comment_again }}
    again = model(torch.cat([ids, token], dim=1), use_cache=False).logits[:, -1]
    # {{ comment_one }}
    one = model(token, past_key_values=first.past_key_values).logits[:, -1]
print("{{ same_next }}:", bool(again.argmax() == one.argmax()))
print("{{ largest_difference }}:", f"{(again - one).abs().max():.1e}")

# %% bytes
cache = first.past_key_values
keys = cache.layers[0].keys
print("{{ shape }}:", tuple(keys.shape))
config = model.config
per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
print(f"{per_token} {{ bytes_per_token }}, {held:,} {{ bytes_held }}")

# %% benchmark
bench = KVCacheBenchmark(model, tokenizer, "cpu", "Embedded Llama")
results = bench.run_conversational_benchmark(
    ["none", "dynamic", "static"], "insurance_claim_auto", num_turns=2, max_new_tokens=24
)

# %% table
summary = bench.analyze_results(results)
columns = {
    "avg_generation_time": "{{ time_s }}",
    "max_memory_usage": "{{ memory_mb }}",
    "avg_tokens_per_second": "{{ tokens_per_s }}",
}
pd.DataFrame(summary).T[list(columns)].rename(columns=columns).astype(float).round(3)

# %% same_words
replies = {name: result["responses"][0] for name, result in results.items()}
print(replies["dynamic"])
print("{{ equal_replies }}:", len(set(replies.values())) == 1)

# %% plot
figure = bench.resumo_plot(results)


# %% metrics
class Stamps(BaseStreamer):
    """{{ stamps_doc }}"""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def generate(strategy, new_tokens=32, stamps=None):
    """{{ generate_doc }}"""
    settings = {"use_cache": strategy != "none"}
    if strategy == "dynamic":
        settings["past_key_values"] = DynamicCache(config=model.config)
    if strategy == "static":
        length = ids.shape[1] + new_tokens
        settings["past_key_values"] = StaticCache(config=model.config, max_cache_len=length)
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        disable_compile=True,
        streamer=stamps,
        **settings,
    )


rows = {}
for strategy in ("none", "dynamic", "static"):
    generate(strategy)
    stamps = Stamps()
    begin = time.perf_counter()
    generate(strategy, stamps=stamps)
    # {{ comment_prompt }}
    times = stamps.times[1:]
    ttft, e2e = times[0] - begin, times[-1] - begin
    rows[strategy] = {
        "TTFT (ms)": 1000 * ttft,
        "TPOT (ms)": 1000 * (e2e - ttft) / (len(times) - 1),
        "E2E (ms)": 1000 * e2e,
    }
pd.DataFrame(rows).T.round(2)


# %% cold
def seconds(strategy):
    begin = time.perf_counter()
    generate(strategy)
    return time.perf_counter() - begin


fresh = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
model, kept = fresh, model
calls = [seconds("dynamic") for _ in range(6)]
model = kept
print("{{ calls_ms }}:", [round(1000 * call) for call in calls])

# %% memory
process = psutil.Process()
before = process.memory_info().rss
output = model.generate(ids, max_new_tokens=64, do_sample=False, pad_token_id=0)
after = process.memory_info().rss
print(f"{{ after_minus_before }}: {(after - before) / 1e6:.2f} MB")
print(f"{{ cache_held }}: {per_token * (output.shape[1] - 1) / 1e6:.2f} MB")

# %% one_run
single = [seconds("static") / seconds("dynamic") for _ in range(6)]
print("{{ single_ratios }}:", [round(ratio, 2) for ratio in single])

# %% rounds
from kvbench import paired_ratio

generator = random.Random(2025)
logs = []
for _ in range(20):
    order = generator.sample(["static", "dynamic"], 2)
    took = {strategy: seconds(strategy) for strategy in order}
    logs.append(math.log(took["static"] / took["dynamic"]))
found = paired_ratio([logs], one_process=True)
low, high = found.interval.low, found.interval.high
print(
    f"static / dynamic = {found.value:.3f} [{low:.3f}, {high:.3f}] {{ in_rounds }} {found.rounds}"
)
print(f"{{ would_find }}: {100 * found.smallest_difference:.1f} %")

# %% drift
figure, axes = plt.subplots(figsize=(6, 2.6))
axes.plot(range(1, len(single) + 1), single, "o", color="#999999", label="{{ label_single }}")
axes.plot(
    range(1, len(logs) + 1),
    [math.exp(log) for log in logs],
    ".",
    color="#0072B2",
    label="{{ label_rounds }}",
)
axes.axhspan(low, high, color="#0072B2", alpha=0.2, label="{{ label_interval }}")
axes.axhline(1, color="black", lw=0.6)
axes.set(xlabel="{{ label_number }}", ylabel="static / dynamic")
axes.legend(frameon=False, fontsize=8)
# %% keys
from kvbench import Request, request_key

bank = Request(model="m", system="You answer for a bank.", prompt="How do I close my account?")
shop = Request(model="m", system="You answer for a shop.", prompt="How do I close my account?")
print("{{ key_prompt_only }}:", request_key(bank, ["prompt"]) == request_key(shop, ["prompt"]))
print("{{ key_whole }}:", request_key(bank) == request_key(shop))

# %% similar
from kvbench import SentenceEncoder

pairs = [
    ("How do I start a claim?", "How do I file a claim?"),
    ("How do I start a claim?", "How do I cancel a claim?"),
    ("Is ibuprofen safe for me?", "Is ibuprofen unsafe for me?"),
]
encoder = SentenceEncoder()
for one, other in pairs:
    cosine = float(encoder(one) @ encoder(other))
    print(f"{cosine:.3f}  {one}  |  {other}")
