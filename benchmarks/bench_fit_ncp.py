"""`fit_ncp` against the bare loop that it wraps: forward, backward and Adam on the same batches, with no engine at all.

Both train the same classifier on 60,000 codes of 50 dimensions held in memory, with a fresh batch of base draws at
every step. The engine's share in a step is what the ratio leaves below 1; it includes the held-out loss.
"""

import json
import os
import platform
import time

import torch
from timing import DEVICES
from torch import nn

import ncpvae
from ncpvae import MLPClassifier, NoiseContrastivePrior, Normal, fit_ncp, objectives

N, D, STEPS, ROUNDS = 60_000, 50, 300, 3
CASES = [(512, (256, 256, 256)), (512, (100, 100)), (128, (100, 100))]


def bare(codes: torch.Tensor, batch_size: int, hidden: tuple[int, ...]) -> float:
    """Steps per second of the loop one would write by hand."""
    classifier = MLPClassifier(D, hidden, nn.SiLU).to(codes.device)
    base = Normal(D).to(codes.device)()
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3, fused=True)
    start = time.perf_counter()
    for _ in range(STEPS):
        q = codes[torch.randint(N, (batch_size,), device=codes.device)]
        logits = classifier(torch.cat([q, base.sample((batch_size,))]))
        loss = objectives.nce(logits[:batch_size], logits[batch_size:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    loss.item()  # waits for the device
    return STEPS / (time.perf_counter() - start)


def engine(codes: torch.Tensor, batch_size: int, hidden: tuple[int, ...]) -> float:
    """Steps per second of `fit_ncp` over as many steps as it logs, set-up left out as in `bare`."""
    prior = NoiseContrastivePrior(Normal(D), MLPClassifier(D, hidden, nn.SiLU)).to(codes.device)
    result = fit_ncp(prior, codes, steps=STEPS, batch_size=batch_size, progress=False, validate_every=STEPS)
    return STEPS / result.seconds


for device in DEVICES:
    codes = torch.randn(N, D, device=device) * 0.8 + 0.2
    for batch_size, hidden in CASES:
        rates: dict[str, list[float]] = {"bare": [], "fit_ncp": []}
        for round_ in range(ROUNDS + 1):
            for name, function in (("bare", bare), ("fit_ncp", engine)):
                rate = function(codes, batch_size, hidden)
                if round_:  # the first round warms up
                    rates[name].append(rate)
        best = {name: max(values) for name, values in rates.items()}
        record = {
            "benchmark": "fit_ncp",
            "N": N,
            "D": D,
            "batch_size": batch_size,
            "hidden": hidden,
            "steps": STEPS,
            "steps_per_second": {name: round(value, 1) for name, value in best.items()},
            "ratio": round(best["fit_ncp"] / best["bare"], 3),
            "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 2),
            "torch": torch.__version__,
            "ncpvae": ncpvae.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        print(json.dumps(record), flush=True)
