"""A check of what kernels move and wait for, by the simulator's counters and timing model.

    CUSIM=/path/to/cusim python .ci/counters.py     (a Python with a CUDA build of torch and the `sim` build of illada)

Fails where a promise of a page in docs/kernels is broken.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CUSIM = Path(os.environ["CUSIM"]).resolve()
VOCAB = 155_136

SAMPLE = """
import torch, torch_on_cusim
torch_on_cusim.enable()
import illada
logits = (2 * torch.randn({rows}, {vocab}, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16).cuda()
illada.sample_tokens(logits, temperature={temperature}, seed=1)
"""
REMASK = """
import torch, torch_on_cusim
torch_on_cusim.enable()
import illada
count = 8192
rows = torch.arange(count, dtype=torch.int32).cuda()
confidence = torch.rand(count, generator=torch.Generator().manual_seed(0)).cuda()
sample = illada.TokenSample(torch.arange(count).cuda(), confidence, confidence.log())
cu_rows = torch.tensor([0, count], dtype=torch.int32).cuda()
illada.remask(torch.full((count,), 5).cuda(), rows, cu_rows, sample, quota=1000, mask_id=5)
"""
ATTENTION = """
import torch, torch_on_cusim
torch_on_cusim.enable()
import illada
generator = torch.Generator().manual_seed(0)
heads = (4 * {kv_heads}, {kv_heads}, {kv_heads}, 4 * {kv_heads})
q, k, v, dout = (torch.randn(1024, n, 128, generator=generator).to(torch.bfloat16).cuda() for n in heads)
leaves = [x.requires_grad_() for x in (q, k, v)]
lengths = torch.tensor([0, 1024], dtype=torch.int32).cuda()
out = illada.varlen_attention(*leaves, lengths, deterministic={deterministic})
torch.autograd.grad(out, leaves, dout)
"""
LOSS = """
import torch, torch_on_cusim
torch_on_cusim.enable()
import illada
generator = torch.Generator().manual_seed(0)
hidden, weight = (torch.randn(n, {width}, generator=generator) for n in ({rows}, {vocab}))
leaves = [x.to(torch.bfloat16).cuda().requires_grad_() for x in (hidden / {width}**0.5, weight)]
targets = torch.randint({vocab}, ({rows},), generator=generator).cuda()
loss = illada.linear_masked_cross_entropy(*leaves, targets, torch.ones({rows}).cuda())
torch.autograd.grad(loss, leaves)
"""


def run(code: str, *options: str) -> str:
    """Run Python code under the simulator and return what it printed."""
    environment = {**os.environ, "PYTHONPATH": f"{CUSIM}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [str(CUSIM / "cusim"), "run", *options, "--", sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stdout}\n{done.stderr}")
    return done.stdout + done.stderr


def counters(code: str, kernel: str) -> list[dict]:
    """Return the reports of the launches whose names contain `kernel`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        run(code, "--report", str(report))
        return [r for r in map(json.loads, report.read_text().splitlines()) if kernel in r["kernel"]]


def main() -> None:
    """Compare the kernels' counters with what they should be; exit with an error where they differ."""
    faults = []

    def expect(what: str, value: float, low: float, high: float) -> None:
        met = low <= value <= high
        print(f"{'ok    ' if met else 'FAULT '} {what}: {value:.4g} (allowed {low:.4g} .. {high:.4g})")
        if not met:
            faults.append(what)

    for temperature in (0, 1):
        name = f"sample_tokens, 16 x {VOCAB}, temperature {temperature}"
        report, *_ = counters(SAMPLE.format(rows=16, vocab=VOCAB, temperature=temperature), "sample_tokens_sm80")
        memory, logits = report["global"], 16 * VOCAB * 2
        expect(f"{name}: bytes read / bytes of the logits", memory["load_bytes"] / logits, 1.0, 1.03)
        expect(
            f"{name}: share of the loaded sectors used",
            memory["load_bytes"] / (32 * memory["load_sectors"]),
            0.98,
            1.02,
        )
        expect(f"{name}: local memory accesses", report["local_accesses"], 0, 0)
        # A few at the end of a row, where eight warps leave their leaders: none for each vector.
        conflicts = report["shared"]["conflict_excess"] / report["grid"][0]
        expect(f"{name}: bank conflicts a CTA", conflicts, 0, 8)

    report, *_ = counters(REMASK, "remask")
    expect("remask, 8192 candidates: bank conflicts", report["shared"]["conflict_excess"], 0, 0)
    expect("remask, 8192 candidates: local memory accesses", report["local_accesses"], 0, 0)

    code = SAMPLE.format(rows=1024, vocab=VOCAB, temperature=0)
    text = run(code, "--timing-fast", "--timing-kernel", "sample_tokens_sm80")
    busy = {name: float(share) for name, share in re.findall(r"([\w/ ]+?) ([\d.]+)%[,\n]", text.split("busy:")[1])}
    busy = {name.strip(): share for name, share in busy.items()}
    hbm = busy.pop("HBM share")
    expect("sample_tokens, 1024 rows, temperature 0: percent of the time that HBM is busy", hbm, 90, 100)
    rest = max(busy, key=busy.__getitem__)
    expect(f"... and the next busiest pipe ({rest})", busy[rest], 0, hbm)
    _plan, report, *backward = counters(ATTENTION.format(kv_heads=8, deterministic=False), "illada_attention")
    name, size = "attention forward, 1 x 1024, 32 / 8 heads of 128, bfloat16", 1024 * 128 * 2
    # Pairs of tiles of 32 tokens: each reads the keys and values of its head once, and its own queries.
    planned = 16 * 8 * 2 * size + 32 * size
    expect(f"{name}: bytes loaded / planned", report["global"]["tma_load_bytes"] / planned, 0.95, 1.05)
    expect(f"{name}: bytes stored / bytes of out", report["global"]["tma_store_bytes"] / (32 * size), 1.0, 1.0)
    cycles = dict(report["min_cycles"])
    tensor = cycles.pop("tensor")
    other = max(cycles, key=cycles.__getitem__)
    expect(f"{name}: cycles of the tensor cores / of the next busiest ({other})", tensor / cycles[other], 1.1, 10)
    conflicts = report["shared"]["conflict_excess"] + report["shared"]["matrix_conflict_excess"]
    expect(f"{name}: bank conflicts", conflicts, 0, 0)
    expect(f"{name}: local memory accesses", report["local_accesses"], 0, 0)

    # Of 64 tiles of keys two CTAs each share the rows, so that all multiprocessors have some; 72 are enough.
    for kv_heads, pieces, deterministic in ((8, 2, False), (9, 1, True), (9, 1, False)):
        name = f"attention backward, 1 x 1024, {4 * kv_heads} / {kv_heads} heads of 128, bfloat16"
        name += ", deterministic" if deterministic else ""
        if kv_heads != 8:
            code = ATTENTION.format(kv_heads=kv_heads, deterministic=deterministic)
            _plan, _forward, *backward = counters(code, "illada_attention")
        expect(f"{name}: launches", len(backward), 2 + (pieces > 1), 2 + (pieces > 1))  # a last one for dk and dv
        report = next(r for r in backward if "backward_keys_sm90" in r["kernel"])
        # An item is 128 keys of a head against all rows, 64 in a step.
        items, rows, row, key_tile = kv_heads * 1024 // 128, 1024 * 4, 128 * 2, 128 * 128 * 2
        planned = items * (2 * rows * row + pieces * 2 * key_tile)  # q, dout; k, v
        expect(f"{name}: bytes loaded in tiles / planned", report["global"]["tma_load_bytes"] / planned, 1.0, 1.0)
        all_rows = kv_heads * rows
        # Statistics, and sums of dq once; the rest are items of the list: one address, but counted for each thread.
        planned = items * rows * 8 + all_rows * 2 * row
        loaded = report["global"]["load_bytes"] / planned
        if not deterministic:  # who waits for a turn looks at a counter, here without a pause
            expect(f"{name}: other bytes loaded / statistics, sums", loaded, 1.0, 1.25)
        gradients = 2 * key_tile if pieces == 1 else pieces * 2 * 2 * key_tile  # dk, dv; in fp32 as sums
        planned = items * (rows * 2 * row + gradients) + all_rows * row  # dq in fp32, and once in 16 bits
        # A CTA's first step adds the dq of none before it, where nobody looks.
        most = 1 + 1.1 * pieces / 64
        expect(f"{name}: bytes added or stored / planned", report["global"]["store_bytes"] / planned, 1.0, most)
        conflicts = report["shared"]["conflict_excess"] + report["shared"]["matrix_conflict_excess"]
        expect(f"{name}: bank conflicts", conflicts, 0, 0)
        expect(f"{name}: local memory accesses of all launches", sum(r["local_accesses"] for r in backward), 0, 0)
    cycles = dict(report["min_cycles"])
    tensor = cycles.pop("tensor")
    other = max(cycles, key=cycles.__getitem__)
    # Shared memory, because TMA fills it as well: the products alone read a little less than the tensor cores' time.
    # Each warp reads its item and step there too, for want of registers.
    expect(f"{name}: cycles of the tensor cores / of the next busiest ({other})", tensor / cycles[other], 0.91, 10)
    rows, vocab, width = 512, 2048, 1024
    reports = counters(LOSS.format(rows=rows, vocab=vocab, width=width), "illada_linear_masked_cross_entropy")
    name = f"linear_masked_cross_entropy, {rows} x {width} x {vocab}, bfloat16"
    expect(f"{name}: launches", len(reports), 9, 9)
    by_gemm = [r for r in reports if re.search("(logits|grad)_sm90", r["kernel"])]
    logit_gemm, again, hidden_grad, weight_grad = by_gemm
    # A pair of CTAs has a tile of 256 x 256, and reads 64 KB for 64 of K.
    tile = 64 * 1024
    planned = (rows // 256) * (vocab // 256) * (width // 64) * tile  # as much for each GEMM
    for gemm, counted, stored in (
        ("logits", logit_gemm, rows * vocab * 2),
        ("gradient of hidden", hidden_grad, 8 * rows * width * 4),  # eight splits of the vocabulary
        ("gradient of the weight", weight_grad, vocab * width * 4),
    ):
        memory = counted["global"]
        expect(f"{name}, {gemm}: bytes loaded in tiles / planned", memory["tma_load_bytes"] / planned, 1.0, 1.0)
        expect(f"{name}, {gemm}: bytes stored in tiles / of the result", memory["tma_store_bytes"] / stored, 1.0, 1.0)
    expect(f"{name}: bytes moved to do again what needs no second time", again["global"]["tma_load_bytes"], 0, 0)
    conflicts = sum(r["shared"]["conflict_excess"] + r["shared"]["matrix_conflict_excess"] for r in reports)
    expect(f"{name}: bank conflicts of all launches", conflicts, 0, 0)
    expect(f"{name}: local memory accesses of all launches", sum(r["local_accesses"] for r in reports), 0, 0)
    cycles = {pipe: count for pipe, count in logit_gemm["min_cycles"].items() if pipe not in ("L2", "HBM")}
    tensor = cycles.pop("tensor")
    other = max(cycles, key=cycles.__getitem__)
    expect(f"{name}: cycles of the tensor cores / of the next busiest pipe ({other})", tensor / cycles[other], 1.0, 10)
    if faults:
        raise SystemExit(f"{len(faults)} promises broken")


if __name__ == "__main__":
    main()
