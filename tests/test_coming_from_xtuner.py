"""The page for users of XTuner V1 says of every field of its TrainerConfig, optimizer, schedule and loss what stands for it
here, or that nothing does; and what it names on our side exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "coming_from_xtuner.md").read_text(encoding="utf-8")
ROWS = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
# Of TrainerConfig, AdamWConfig, LRConfig, the loss and the data loader, as they are spelled there.
FIELDS = """
model_cfg load_from tokenizer_path dataset_cfg dataloader_cfg optim_cfg lr_cfg loss_cfg fsdp_cfg
global_batch_size work_dir log_dir sp_size total_step total_epoch epoch_num resume_cfg auto_resume
load_checkpoint_cfg strict_load checkpoint_interval checkpoint_maxkeep snapshot_interval
check_health_interval hf_interval hf_max_keep async_hf_export async_checkpoint
skip_checkpoint_validation patch_for_dcp_finish exp_tracker profile_step profile_time profile_memory
intra_layer_micro_batch seed dist_backend debug debug_skip_save prober_list do_clip grad_norm_dtype
hooks_config internal_metrics_cfg foreach swap_optimizer skip_grad_norm_threshold max_grad_norm
lr_type warmup_ratio lr_min loss_reduction mode chunk pack_level collator pack_max_length num_workers
dataset_config_list class_name anno_path sample_ratio cache_dir cache_tag media_root chat_template
max_dynamic_patch max_num_frames param_dtype reduce_dtype recompute_ratio ep_size hsdp_sharding_size
enable_sequential_sampler enable_mmap_shared disable_filter hash pack_to_max_length pack_chunk_size pack_workers
pack_extra_buffer_size global_pack group_by_length round_up sampler_type pad_token_id tokenizer_hash
pack_config_path sampler_config_path min_num_frames min_dynamic_patch data_augment system_message
oss_loader_cfg add_bos_token add_eos_token llm_pack_weight visual_pack_weight trim_memory_interval
tp_size cpu_offload torch_compile reshard_after_forward fp32_lm_head vision_recompute_ratio
checkpoint_preserve_rng_state balancing_loss_cfg z_loss_cfg freeze_routers dispatcher router
after_train_step after_save_dcp after_save_hf clip frames_timestamp IMG_CONTEXT VIDEO_CONTEXT
""".split()


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_has_a_row(field: str) -> None:
    assert any(re.search(rf"\b{field}\b", " | ".join(row)) for row in ROWS)


def test_what_stands_for_it_is_in_the_schema_of_a_run() -> None:
    schema = json.loads((ROOT / "configs" / "run_config.schema.json").read_text(encoding="utf-8"))
    text = json.dumps(schema)
    ours = {name for row in ROWS[1:] for name in re.findall(r"`([a-z_.A-Z0-9]+)`", row[1])}
    ours -= {"metrics.jsonl"}
    assert len(ours) > 30
    for name in sorted(ours):
        assert all(f'"{part}"' in text for part in name.split(".")), name
