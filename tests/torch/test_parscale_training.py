"""Training a ParScale model: FSDP2 over eight processes, torch.compile, PEFT, TRL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import SIZES, tokens

from heddle.torch.parscale import Qwen2ParScaleConfig, Qwen2ParScaleForCausalLM

TESTS = Path(__file__).parents[1]
IDS = torch.from_numpy(tokens(2, 7)).long()


def build(**changes) -> Qwen2ParScaleForCausalLM:
    torch.manual_seed(0)
    sizes = SIZES | {"parscale_n": 3, "parscale_n_tokens": 4, "enable_cross_attn": True, "initializer_range": 0.1}
    return Qwen2ParScaleForCausalLM(Qwen2ParScaleConfig(**(sizes | changes)))


@pytest.mark.slow
def test_fsdp_over_eight_processes_equals_one():
    """With 4 and 8 replicas, eager and compiled, layers checkpointed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=8"]
    done = subprocess.run(
        [*torchrun, TESTS / "torch" / "parscale_cases.py"],
        env=environment, capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    runs = [line for line in done.stdout.splitlines() if line.startswith("same")]
    assert runs == [f"same: {p} replicas, {how}" for p in (4, 8) for how in ("eager", "compiled")]


@pytest.mark.slow
def test_compiled_whole():
    program = """if True:
        import torch
        from heddle.torch.parscale import Qwen2ParScaleConfig, Qwen2ParScaleForCausalLM

        for mode in ("joint", "sublayer"):
            torch.manual_seed(0)
            model = Qwen2ParScaleForCausalLM(Qwen2ParScaleConfig(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, parscale_n=3, parscale_n_tokens=4, enable_cross_attn=True,
                enable_replica_rope=True, parscale_cross_attn_mode=mode))
            ids = torch.randint(0, 64, (2, 9))
            mask = torch.ones_like(ids)
            mask[1, :3] = 0
            grads = []
            for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
                model.zero_grad()
                loss = run(ids, attention_mask=mask, labels=ids, use_cache=False).loss
                loss.backward()
                grads.append([loss.detach()] + [p.grad.clone() for p in model.parameters()])
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
        print("same")
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout == "same\n"


def test_a_frozen_backbone_trains_what_is_new():
    model = build()
    new = model.new_parameters()
    model.requires_grad_(False)
    for parameter in new.values():
        parameter.requires_grad_(True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(new.values(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in new), name


@pytest.mark.filterwarnings("ignore::FutureWarning")  # its use of what transformers has renamed
def test_peft_trains_adapters_and_what_is_new(tmp_path):
    import peft

    model = build()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"],
        modules_to_save=["aggregate_layer", "cross_attn_proj"],
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "prefix_" in name or "cross_attn_bias" in name:
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    first = wrapped(input_ids=IDS, labels=IDS).loss
    first.backward()
    for name, parameter in wrapped.named_parameters():
        trained = any(m in name for m in ("lora_", "modules_to_save", "prefix_", "cross_attn_bias"))
        assert (parameter.grad is not None) == trained, name
    optimizer.step()
    assert wrapped(input_ids=IDS, labels=IDS).loss < first
    logits = wrapped(input_ids=IDS).logits
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, logits)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(Qwen2ParScaleForCausalLM.from_pretrained(tmp_path)(IDS).logits, logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # its use of what transformers has renamed
def test_trl_takes_a_step(tmp_path):
    import datasets
    import trl

    model = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": row.tolist()} for row in torch.from_numpy(tokens(4, 9))]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=True, packing=False, save_strategy="no", learning_rate=1e-2, disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=_tokenizer(),
    )  # fmt: skip
    trainer.train()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def _tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(SIZES["vocab_size"])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w2", pad_token="w0"
    )
