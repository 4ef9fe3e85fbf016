"""What other trainers call their settings, and what sftx calls them: one table, for the errors and the docs.

From Hugging Face's TrainingArguments, TRL, PEFT, LLaMA-Factory, axolotl and ms-swift.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Counterpart:
    """Names that other trainers use for one thing; those with `*` are prefixes."""

    names: str
    """Separated by spaces."""
    ours: str
    """sftx's key, with its value where the name already implies it; empty where sftx has none."""
    note: str = ""
    note_zh: str = ""

    def answer(self) -> str:
        """Return what to tell a user who typed one of the names."""
        if not self.ours:
            return f"sftx has no such setting: {self.note}."
        return f"In sftx it is `{self.ours}`{f': {self.note}' if self.note else ''}."


def counterpart(name: str) -> Counterpart | None:
    """Return the row of the table for another trainer's name, or None; spelling with `-` or capitals is the same."""
    name = name.replace("-", "_").lower()
    return next((row for row in TABLE if any(fnmatchcase(name, pattern) for pattern in row.names.split())), None)


_NONE_TO_CHOOSE = "it is always done where it helps; leave it out", "sftx 会自动处理，去掉即可"
_NO_METHOD = "this method is not implemented; leave it out", "未实现该方法，去掉即可"
_IN_THE_MODEL = "it is read from the model's own files; leave it out", "从模型自带的文件读取，去掉即可"
_SFT_ONLY = "train.py does supervised fine-tuning only; leave it out", "train.py 只做有监督微调，去掉即可"

TABLE = (
    # model
    Counterpart(
        "base_model model_path model_id model_name model_dir pretrained_model_name_or_path pretrained_model",
        "model_name_or_path",
    ),
    Counterpart("adapter_name_or_path adapters lora_model_dir lora_path peft_model_id", "adapter"),
    Counterpart("model_revision revision cache_dir", "", "give a local folder as model_name_or_path; the download "
                "folder is set by the environment variable HF_HOME", "请用本地目录作为 model_name_or_path；下载目录由"
                "环境变量 HF_HOME 指定"),
    Counterpart("hf_token hub_token hf_hub_token use_auth_token hf_use_auth_token", "", "set the environment variable "
                "HF_TOKEN", "请设置环境变量 HF_TOKEN"),
    Counterpart("attn_impl flash_attn flash_attention flash_attention_2 use_flash_attention use_flash_attention_2 "
                "use_flash_attn sdp_attention eager_attention xformers_attention", "attn_implementation"),
    Counterpart("torch_dtype dtype compute_dtype infer_dtype bnb_4bit_compute_dtype pure_bf16 bfloat16 float16 float32 "
                "half_precision_backend mixed_precision fp16_opt_level", "precision", "fp16, bf16 or fp32",
                "fp16、bf16 或 fp32"),
    Counterpart("model_type rope_scaling resize_vocab add_tokens add_special_tokens new_special_tokens special_tokens "
                "use_fast_tokenizer tokenizer_type use_cache num_labels task_type tokens", "", *_IN_THE_MODEL),
    Counterpart("use_unsloth* use_liger_kernel liger_kernel_config enable_liger_kernel low_cpu_mem_usage device_map "
                "auto_find_batch_size torch_empty_cache_steps", "", *_NONE_TO_CHOOSE),
    # what is trained
    Counterpart("finetuning_type tuner_type train_type sft_type use_peft peft_type use_lora", "mode",
                "lora, qlora or full", "lora、qlora 或 full"),
    Counterpart("load_in_4bit quantization_bit quant_bits quant_method quantization_method use_qlora", "mode=qlora",
                "the base in 4 bits", "基座模型为 4 比特"),
    Counterpart("load_in_8bit", "", "a base in 8 bits is not offered, one in 4 bits is: mode=qlora",
                "不支持 8 比特基座，4 比特为 mode=qlora"),
    Counterpart("bnb_4bit_quant_type quantization_type", "mode.quant_type"),
    Counterpart("bnb_4bit_use_double_quant use_bnb_nested_quant double_quantization", "mode.double_quant"),
    Counterpart("r rank lora_r lora_dim", "lora_rank"),
    Counterpart("alpha", "lora_alpha"),
    Counterpart("dropout", "lora_dropout"),
    Counterpart("peft_use_rslora", "mode.use_rslora"),
    Counterpart("use_dora peft_use_dora lora_ga_* pissa_* init_lora_weights peft_init_lora_weights init_weights "
                "loraplus_* lorap_lr_ratio loftq_* optim_target_modules adalora_* vera_* "
                "boft_* oft_* relora* use_galore galore_* use_apollo apollo_* use_badam badam_* "
                "lisa_* use_muon use_adam_mini use_llama_pro neftune_noise_alpha "
                "label_smoothing_factor label_smoothing", "", *_NO_METHOD),
    Counterpart("target_modules lora_target lora_target_linear lora_modules target_regex", "lora_target_modules",
                "all-linear, attention, [names] or a pattern", "all-linear、attention、[名称] 或正则表达式"),
    Counterpart("lora_bias bias modules_to_save lora_modules_to_save additional_target embedding_lr embedding_lr_scale "
                "lora_target_parameters target_parameters", "", "adapters are put on linear layers only; mode=full "
                "trains all parameters", "适配器只加在线性层上；mode=full 训练全部参数"),
    Counterpart("freeze_* unfrozen_parameters trainable_parameters trainable_parameters_regex", "mode",
                "lora and qlora freeze the base; full trains all of it", "lora、qlora 冻结基座，full 全部训练"),
    Counterpart("stage do_train do_eval do_predict prediction_loss_only rl rlhf_type pref_*", "", *_SFT_ONLY),
    # data
    Counterpart("dataset datasets dataset_name dataset_path data_path data_files train_file train_data train_dataset",
                "train_file_name", "its folder is train_file_path", "所在目录为 train_file_path"),
    Counterpart("dataset_dir data_dir", "train_file_path"),
    Counterpart("eval_dataset val_dataset test_datasets eval_file validation_file val_file eval_data",
                "eval_file_name"),
    Counterpart("val_size val_set_size split_dataset_ratio test_size test_split_size validation_split_percentage",
                "eval_ratio"),
    Counterpart("max_samples max_train_samples num_samples", "max_train_rows"),
    Counterpart("max_eval_samples eval_limit", "eval_max_rows"),
    Counterpart("preprocessing_num_workers dataset_num_proc dataset_processes", "data.num_workers"),
    Counterpart("buffer_size shuffle_buffer_size", "data.shuffle_window"),
    Counterpart("template chat_template chat_template_path prompt_template", "template_name",
                "a name that sftx knows; the model's own needs none", "sftx 内置的模板名；使用模型自带模板时不必设置"),
    Counterpart("system_prompt default_system", "data.system"),
    Counterpart("dataset_text_field text_column prompt_column response_column messages_column", "data.columns"),
    Counterpart("cutoff_len max_length max_seq_len max_model_len sequence_len model_max_length block_size seq_length "
                "context_length max_source_length max_target_length", "max_seq_length"),
    Counterpart("truncation_strategy truncation_mode excess_length_strategy", "data.too_long"),
    Counterpart("train_on_inputs train_on_prompt completion_only_loss assistant_only_loss train_on_responses_only "
                "train_on_completions_only", "", "the answers are always what is trained on", "始终只对回答计算损失"),
    Counterpart("mask_history", "data.train_on=last"),
    Counterpart("packing sample_packing neat_packing", "batching=packed"),
    Counterpart("batch_flattening", "batching=padding_free"),
    Counterpart("group_by_length train_sampling_strategy", "batching=length_bucketed"),
    Counterpart("eval_packing eval_sample_packing pad_to_multiple_of pad_to_sequence_len padding_side packing_* "
                "sample_packing_* length_column_name label_names dataloader_* overwrite_cache "
                "load_from_cache_file ignore_data_skip disable_shuffling accelerator_config", "", *_NONE_TO_CHOOSE),
    # steps and batches
    Counterpart("epochs epoch n_epochs num_epochs max_epochs total_epochs", "num_train_epochs"),
    Counterpart("steps num_steps total_steps max_train_steps", "max_steps"),
    Counterpart("batch_size micro_batch_size micro_batch train_batch_size per_gpu_train_batch_size "
                "per_device_batch_size train_micro_batch_size_per_gpu", "per_device_train_batch_size",
                "a step takes this many times gradient_accumulation_steps, on each device",
                "每步样本数 = 该值 x gradient_accumulation_steps x 设备数"),
    Counterpart("global_batch_size", "gradient_accumulation_steps",
                "with per_device_train_batch_size=auto, the sequences of a step on one device",
                "per_device_train_batch_size=auto 时，即每个设备每步的样本数"),
    Counterpart("per_device_eval_batch_size eval_batch_size per_gpu_eval_batch_size eval_accumulation_steps", "",
                "evaluation uses the training batch's size in tokens", "评估沿用训练时的批次大小（按 token 计）"),
    Counterpart("grad_accum grad_accum_steps gradient_accumulation accumulate_grad_batches accumulation_steps",
                "gradient_accumulation_steps"),
    # optimizer and schedule
    Counterpart("lr peak_lr max_lr base_lr", "learning_rate"),
    Counterpart("wd", "weight_decay"),
    Counterpart("optimizer_type optim_type optimizer_name optim_args", "optimizer"),
    Counterpart("adam_beta1 adam_beta2 beta1 beta2", "optimizer.betas", "a list of both: [0.9,0.999]",
                "两个值的列表：[0.9,0.999]"),
    Counterpart("adam_epsilon epsilon", "optimizer.eps"),
    Counterpart("lr_scheduler scheduler_type lr_schedule lr_decay_style lr_scheduler_kwargs", "scheduler"),
    Counterpart("warmup warmup_ratio warmup_fraction num_warmup_steps lr_warmup_steps", "warmup_steps",
                "a number below 1 is a share of all steps", "小于 1 时表示占总步数的比例"),
    Counterpart("cosine_min_lr_ratio min_lr_ratio min_lr lr_end", "scheduler.floor",
                "a share of learning_rate, with scheduler=cosine_with_min_lr",
                "占 learning_rate 的比例，配合 scheduler=cosine_with_min_lr"),
    Counterpart("max_norm grad_clip gradient_clipping clip_grad_norm gradient_clip_val grad_clip_norm",
                "max_grad_norm"),
    # memory, speed and devices
    Counterpart("deepspeed deepspeed_config use_deepspeed zero_stage zero3 ds_config", "parallel=zero3",
                "its settings are parallel.*; no JSON file is read", "其设置为 parallel.*，不读取 JSON 文件"),
    Counterpart("fsdp fsdp_*", "parallel=zero3", "sharding by DeepSpeed; FSDP is not offered",
                "由 DeepSpeed 切分；不支持 FSDP"),
    Counterpart("ddp ddp_*", "parallel=ddp", "its settings are parallel.*", "其设置为 parallel.*"),
    Counterpart("n_gpu num_gpus nproc_per_node num_processes world_size", "parallel.num_processes",
                "with parallel=ddp or parallel=zero3", "配合 parallel=ddp 或 parallel=zero3"),
    Counterpart("local_rank master_addr master_port", "", "torchrun sets it; leave it out",
                "由 torchrun 设置，去掉即可"),
    Counterpart("tensor_parallel_size sequence_parallel_size sequence_parallel_degree context_parallel_size "
                "parallelism_config dp_shard_size dp_replicate_size pipeline_parallel_size fp8*", "",
                "it is not offered; leave it out", "暂不支持，去掉即可"),
    Counterpart("activation_checkpointing use_gradient_checkpointing disable_gradient_checkpointing "
                "activation_checkpointing_kwargs gradient_checkpointing_kwargs use_reentrant_gc",
                "gradient_checkpointing"),
    Counterpart("activation_offloading", "gradient_checkpointing=offload"),
    Counterpart("selective_checkpointing", "gradient_checkpointing=selective"),
    Counterpart("torch_compile torch_compile_*", "compile"),
    Counterpart("tf32", "precision.tf32"),
    Counterpart("use_cpu no_cuda", "device=cpu"),
    # evaluation, logging and saving
    Counterpart("eval_strategy evaluation_strategy do_evaluate val_check_interval evals_per_epoch eval_delay "
                "eval_on_start", "eval_steps", "to turn evaluation off: eval_ratio=0", "关闭评估：eval_ratio=0"),
    Counterpart("load_best_model_at_end metric_for_best_model greater_is_better", "keep_best=true",
                "by the loss of the evaluation", "按评估损失"),
    Counterpart("early_stopping_patience early_stopping_steps early_stop_interval early_stopping_threshold",
                "callback=early_stopping", "its settings are callback.early_stopping.*",
                "其设置为 callback.early_stopping.*"),
    Counterpart("eval_* batch_eval_metrics include_for_metrics compute_accuracy bf16_full_eval fp16_full_eval", "",
                "an evaluation measures the loss; leave it out", "评估只计算损失，去掉即可"),
    Counterpart("logging_strategy log_steps log_interval logging_interval log_every_n_steps", "logging_steps"),
    Counterpart("logging_dir save_dir output_path", "output_dir", "logs are written there too", "日志也写在其中"),
    Counterpart("logging_* log_level* log_on_each_node include_num_input_tokens_seen include_tokens_per_second "
                "include_tkps plot_loss skip_memory_metrics average_tokens_across_devices debug_*", "",
                *_NONE_TO_CHOOSE),
    Counterpart("use_tensorboard tensorboard_dir", "tracker=tensorboard"),
    Counterpart("use_wandb", "tracker=wandb"),
    Counterpart("run_name wandb_name wandb_run_name", "tracker.wandb.name"),
    Counterpart("project wandb_project", "tracker.wandb.project"),
    Counterpart("wandb_entity", "tracker.wandb.entity"),
    Counterpart("use_swanlab swanlab_* mlflow_* use_mlflow comet_* use_comet trackio_*", "tracker",
                "tensorboard and wandb are built in", "内置 tensorboard 和 wandb"),
    Counterpart("save_interval save_every saves_per_epoch save_freq checkpoint_interval", "save_steps"),
    Counterpart("max_checkpoints keep_last_n_checkpoints save_last_n_checkpoints", "save_total_limit"),
    Counterpart("save_only_model save_safetensors safe_serialization max_shard_size save_on_each_node "
                "create_checkpoint_symlink enable_jit_checkpoint restore_callback_states_from_checkpoint", "",
                *_NONE_TO_CHOOSE),
    Counterpart("resume_from_checkpoint auto_resume_from_checkpoints resume_checkpoint ckpt_path", "resume",
                "a run is continued by the same command; a folder can be named", "重复同一命令即可续训，也可指定目录"),
    Counterpart("overwrite_output_dir", "resume=never", "and an output_dir that holds no run",
                "并使用尚无运行的 output_dir"),
    Counterpart("push_to_hub hub_* push_dataset_to_hub", "", "upload it yourself: hf upload ORG/NAME RUN/final",
                "请自行上传：hf upload ORG/NAME RUN/final"),
    Counterpart("full_determinism use_deterministic_algorithms", "deterministic"),
    Counterpart("data_seed random_seed", "seed"),
)  # fmt: skip
