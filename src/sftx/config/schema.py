"""The schema: every key's type, bounds and meaning. Values live in `conf/`, never here.

Each field is a top-level key that a user can type as `name=value`. `python train.py --help` and
`docs/parameters.md` are made from this file.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any, Literal, get_type_hints

from sftx.config.bounds import Bounds

Node = dict[str, Any]
"""A component's settings: `_target_` names its class, the other keys are the class's arguments."""


def knob(en: str, zh: str, *, per_trial: bool = False) -> Any:
    """Declare a key: its meaning in English and Chinese; its type, and a number's bounds, are its annotation.

    `per_trial`: trials that share a base model may differ in it; the other keys are facts of the base or the data.
    """
    return field(metadata={"en": en, "zh": zh, "per_trial": per_trial})


def group(en: str, zh: str, classes: str, *, per_trial: bool = False) -> Any:
    """Declare a config group: `name=option` chooses `conf/name/option.yaml`, which names a class of `module: A B C`."""
    module, _, names = classes.partition(":")
    components = [f"{module}.{name}" for name in names.split()]
    return field(metadata={"en": en, "zh": zh, "per_trial": per_trial, "components": components})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run, resolved: what `config.yaml` in the run folder holds."""

    # The manual's knobs, in the manual's order.
    output_dir: str | None = knob(
        "folder of the run: logs, checkpoints, the final parameters; default outputs/runs/<date>/<time>-<mode>-<hash>",
        "存放运行日志、检查点以及最终微调参数的目录；默认 outputs/runs/<日期>/<时间>-<模式>-<哈希>",
        per_trial=True,
    )
    model_name_or_path: str = knob(
        "the model to fine-tune: a local folder, a hub id, or `qwen-tiny`, the embedded model for trying things out",
        "要微调的模型：本地目录、模型库 id，或内置的试用小模型 qwen-tiny",
    )
    train_file_path: str = knob(
        "the folder that holds the corpus, directly or in its csv/ subfolder",
        "训练语料所在的目录，文件可直接放在其中或其 csv/ 子目录中",
    )
    train_file_name: str | list[str] = knob(
        "the corpus in that folder: a CSV of category,human,assistant (or .tsv, .jsonl, .json, .parquet, .arrow, "
        "also .gz and .zst); a pattern (*.csv), a list of names, a folder, a dataset that was saved, or a Hugging Face "
        "dataset: org/name, org/name:split or org/name/config:split, the split being train unless named; "
        "it is converted to JSONL automatically",
        "该目录中的语料：列为 category,human,assistant 的 CSV（或 .tsv、.jsonl、.json、.parquet、.arrow，"
        "可带 .gz、.zst）；也可以是通配符（*.csv）、文件名列表、文件夹、save_to_disk 保存的数据集，"
        "或 Hugging Face 数据集：org/name、org/name:split 或 org/name/config:split，不写 split 即为 train；"
        "会自动转换为 JSONL 再加载",
    )
    template_name: str | None = knob(
        "the chat template; default: the model's own. Usually the model_type in its config.json (qwen2, llama, ...)",
        "对话模板；默认使用模型自带的模板，通常为 config.json 中的 model_type（qwen2、llama 等）",
    )
    train_mode: str = knob(
        "training mode: lora, qlora or full; the same choice as mode=",
        "训练模式：lora、qlora 或 full，与 mode= 等价",
    )
    num_train_epochs: Annotated[float, Bounds(above=0)] = knob(
        "passes over the training data, also a part of one (0.5; rounded up to whole steps); more risks over-fitting, "
        "fewer under-fitting",
        "训练轮数，可为小数（如 0.5，步数向上取整）；过多容易过拟合，过少则欠拟合",
        per_trial=True,
    )
    per_device_train_batch_size: Annotated[int | Literal["auto"], Bounds(at_least=1)] = knob(
        "sequences per device and micro-batch; auto: gradient_accumulation_steps sequences per step, in as few "
        "micro-batches as memory allows, halved when it runs out",
        "每个设备每个微批次的样本数；auto：每步共 gradient_accumulation_steps 个样本，微批次尽量大，显存不足即减半",
        per_trial=True,
    )
    gradient_accumulation_steps: Annotated[int, Bounds(at_least=1)] = knob(
        "micro-batches per optimizer step", "梯度累积步数，即每次参数更新所用的微批次数", per_trial=True
    )
    learning_rate: Annotated[float, Bounds(above=0)] = knob(
        "step size: too high diverges, too low converges slowly; full mode's default is 1e-5",
        "学习率：过大发散，过小收敛缓慢；full 模式默认 1e-5",
        per_trial=True,
    )
    max_seq_length: Annotated[int, Bounds(at_least=8)] = knob(
        "the longest sequence in tokens; cost and memory grow with it, and it should cover most rows",
        "最大序列长度（token 数）；越长开销越大，应覆盖大多数样本",
    )
    logging_steps: Annotated[int, Bounds(at_least=1)] = knob(
        "optimizer steps between two train-loss records", "每隔多少步记录一次训练损失", per_trial=True
    )
    save_steps: Annotated[int | Literal["auto"], Bounds(at_least=1)] = knob(
        "optimizer steps between two checkpoints; auto: from lost_work_minutes, but at most 3 % of the time "
        "is spent on saving",
        "每隔多少步保存一次检查点；auto：按 lost_work_minutes 决定，但保存所占时间不超过 3%",
        per_trial=True,
    )
    save_strategy: Literal["steps", "epoch", "no"] = knob(
        "when checkpoints are saved: steps, epoch or no", "保存检查点的时机：steps、epoch 或 no", per_trial=True
    )
    save_total_limit: Annotated[int | None, Bounds(at_least=1)] = knob(
        "how many checkpoints are kept; the oldest go first, never the last good one, never the best; null keeps all",
        "最多保留多少个检查点，先删最旧的，但不删最后一个可用的，也不删最好的；null 表示全部保留",
        per_trial=True,
    )
    lr_scheduler_type: str = knob(
        "the learning-rate schedule; the same choice as scheduler=", "学习率调度器，与 scheduler= 等价", per_trial=True
    )
    warmup_steps: Annotated[int | float, Bounds(at_least=0)] = knob(
        "warm-up steps, over which the lr rises to learning_rate; a fraction below 1 is a share of all steps; "
        "5-10 % is usual",
        "学习率从 0 升到设定值所用的步数；小于 1 的小数表示占总步数的比例，通常取 5-10%",
        per_trial=True,
    )
    lora_rank: Annotated[int, Bounds(at_least=1)] = knob(
        "rank of the LoRA matrices: capacity and cost", "LoRA 矩阵的秩：容量与开销", per_trial=True
    )
    lora_alpha: Annotated[int | float, Bounds(above=0)] = knob(
        "strength of the LoRA update: the scale is alpha / rank",
        "LoRA 更新的强度：缩放系数为 alpha / rank",
        per_trial=True,
    )
    lora_dropout: Annotated[float, Bounds(at_least=0, below=1)] = knob(
        "dropout on the LoRA path; 0.1-0.2 against over-fitting",
        "LoRA 的 dropout，防过拟合可取 0.1-0.2",
        per_trial=True,
    )
    gradient_checkpointing: bool | Literal["selective", "offload"] = knob(
        "recompute activations in the backward pass: less memory, more time; selective: in every other block; "
        "offload: in all blocks, with their inputs kept in host memory",
        "反向传播时重新计算激活值：省显存，但更慢；selective：每隔一层重算；offload：全部重算，各层的输入放在主机内存",
    )
    disable_tqdm: bool = knob(
        "print a progress line every minute instead of a bar", "不显示进度条，改为每分钟输出一行进度"
    )
    optim: str = knob("the optimizer; the same choice as optimizer=", "优化器，与 optimizer= 等价", per_trial=True)
    seed: Annotated[int, Bounds(at_least=0, at_most=9_223_372_036_854_775_807)] = knob(
        "all randomness; set before adapters are made", "随机种子，在创建适配器之前设定", per_trial=True
    )
    fp16: bool = knob(
        "half-precision training; on a device without it (CPU) the run states so and trains in fp32",
        "半精度（fp16）训练；设备不支持时（CPU）会说明并改用 fp32",
    )
    bf16: bool = knob("bfloat16 training, instead of fp16", "bfloat16 训练，与 fp16 二选一")
    report_to: list[str] = knob(
        "where metrics are shown: tensorboard, wandb, both ([tensorboard,wandb]) or none; the same choice as tracker=",
        "指标上报到哪里：tensorboard、wandb、两者 ([tensorboard,wandb]) 或 none，与 tracker= 等价",
        per_trial=True,
    )
    dataloader_num_workers: Annotated[int, Bounds(at_least=0, at_most=1024)] = knob(
        "loader processes", "数据加载进程数"
    )
    weight_decay: Annotated[float, Bounds(at_least=0)] = knob(
        "weight decay, on matrices only", "权重衰减，仅作用于矩阵参数", per_trial=True
    )
    max_grad_norm: Annotated[float, Bounds(at_least=0)] = knob(
        "gradient clipping by norm; 0 turns it off", "梯度裁剪的范数上限；0 为关闭", per_trial=True
    )
    remove_unused_columns: bool = knob(
        "drop the columns other than category, human and assistant before training",
        "训练前是否丢弃 category、human、assistant 之外的列",
    )

    # What sftx adds.
    adapter: str | None = knob(
        "folder of a LoRA adapter to start from, instead of a fresh one",
        "从已有的 LoRA 适配器目录继续微调",
        per_trial=True,
    )
    lora_target_modules: str | list[str] = knob(
        "the linear layers that adapters are put on: all-linear (those of the decoder's blocks), attention, a list of "
        "names ([q_proj,v_proj]), or a regular expression for whole names ('.*layers\\.[0-7]\\..*_proj')",
        "在哪些线性层上加适配器：all-linear（各解码层的全部线性层）、attention（仅注意力）、名称列表（[q_proj,v_proj]），"
        "或匹配完整层名的正则表达式（'.*layers\\.[0-7]\\..*_proj'）",
        per_trial=True,
    )
    resume: str = knob(
        "auto: continue the run in output_dir, or without one the newest unfinished run with the same settings and "
        "data; never: start fresh, and fail if output_dir already holds a run; or the folder of a run (its newest "
        "checkpoint) or of a checkpoint",
        "auto：继续 output_dir 中的运行；未指定时继续设置与数据相同的最近一次未完成的运行；"
        "never：从头开始，目录已被占用则报错；或指定运行目录（取其最新检查点）或检查点目录",
        per_trial=True,
    )
    async_save: bool = knob(
        "write checkpoints during training, from a copy in host memory; false: training waits",
        "训练继续进行的同时写检查点（先复制到内存）；false：训练等待写完",
    )
    template_date: str = knob(
        "the date (YYYY-MM-DD) that chat templates write as today's (Llama 3.2, gpt-oss), so that a resumed or "
        "repeated run sees the same tokens; others ignore it",
        "对话模板中“今天”的日期（YYYY-MM-DD），用于会写入当天日期的模板（Llama 3.2、gpt-oss），"
        "使续训或重复运行得到相同的 token；其他模板不受影响",
    )
    lost_work_minutes: Annotated[float, Bounds(above=0)] = knob(
        "with save_steps=auto: the work that a crash may cost",
        "save_steps=auto 时，意外中断最多损失多少分钟的训练",
        per_trial=True,
    )
    max_steps: Annotated[int | None, Bounds(at_least=1)] = knob(
        "stop after this many optimizer steps; overrides num_train_epochs",
        "最多训练多少步（优先于轮数）",
        per_trial=True,
    )
    max_train_rows: Annotated[int | None, Bounds(at_least=1)] = knob(
        "use only the first rows of the corpus", "只使用语料的前多少行"
    )
    eval_file_name: str | list[str] | None = knob(
        "what is held out, named as train_file_name is: a file in train_file_path, a pattern, a list, a folder or a "
        "hub dataset; without one, eval_ratio of the corpus is held out",
        "评估语料，写法与 train_file_name 相同：train_file_path 中的文件、通配符、列表、文件夹或 Hugging Face 数据集；"
        "不设则按 eval_ratio 从语料中划出",
    )
    eval_ratio: Annotated[float, Bounds(at_least=0, at_most=0.9)] = knob(
        "share of the corpus held out for evaluation, stratified by category; 0 turns evaluation off",
        "按 category 分层划出作为评估集的比例；0 为不评估",
    )
    eval_steps: Annotated[int | Literal["auto"], Bounds(at_least=1)] = knob(
        "optimizer steps between two evaluations; auto: a tenth of the run",
        "每隔多少步评估一次；auto：全程的十分之一",
        per_trial=True,
    )
    eval_max_rows: Annotated[int, Bounds(at_least=1)] = knob(
        "maximum number of rows per evaluation", "评估最多使用多少行"
    )
    keep_best: bool = knob(
        "final/ holds the checkpoint with the lowest eval loss instead of the last state",
        "final/ 保存评估损失最低的检查点，而不是最后的状态",
        per_trial=True,
    )
    final_dtype: Literal["auto", "fp32", "bf16", "fp16"] = knob(
        "mode=full: number format of the weights in final/; auto: the base's own; checkpoints stay in fp32",
        "mode=full 时 final/ 中权重的数值格式；auto 与基座模型一致；检查点始终为 fp32",
    )
    batching: Literal["padding_free", "padded", "length_bucketed", "packed"] = knob(
        "how rows form a micro-batch: padding_free concatenates them without padding, padded pads them, "
        "length_bucketed pads rows of similar length together, packed fills max_seq_length with several rows, so that "
        "an epoch has fewer steps",
        "样本如何组成微批次：padding_free 直接拼接、不填充，padded 填充，length_bucketed 将长度相近的样本放在一起填充，"
        "packed 将多个样本装满 max_seq_length（会减少每轮的步数）",
    )
    attn_implementation: Literal["auto", "sdpa", "eager"] = knob(
        "attention implementation: sdpa is torch's fused one, eager the plain one of the model's own file; auto: sdpa",
        "注意力的实现：sdpa 为 torch 的融合实现，eager 为模型文件自带的朴素实现；auto 即 sdpa",
    )
    compile: bool = knob(
        "compile the model's blocks with TorchInductor: slower to start, faster after; needs a C++ compiler",
        "用 TorchInductor 编译模型的层：启动变慢、之后更快；需要 C++ 编译器",
    )
    deterministic: bool = knob(
        "on a GPU, use deterministic kernels only, so that the same GPU model and versions "
        "give bitwise equal runs. The cost: slower backward passes, above all attention's, and more memory in them. "
        "On a CPU runs are bitwise equal without it",
        "在 GPU 上只用确定性内核，使同型号 GPU、同版本下的运行逐位相同；"
        "代价是反向传播变慢（尤其是注意力部分）并多占显存。CPU 上无需此项即逐位相同",
    )
    device: Literal["auto", "cpu", "cuda"] = knob(
        "where to train; auto takes the GPU when there is one", "训练设备；auto 表示有 GPU 则用 GPU"
    )
    on_nonfinite: Literal["stop", "skip", "rollback"] = knob(
        "what to do when a loss or gradient is not finite, which never changes the weights: stop; skip the step; "
        "rollback to the last checkpoint and continue with half the lr",
        "损失或梯度非有限值时（绝不会更新权重）：stop 停止，skip 跳过该步，rollback 回到上一个检查点并将学习率减半",
    )
    on_loss_spike: Literal["warn", "skip", "rollback", "stop"] = knob(
        "what to do on a loss spike (more than 6 standard deviations and 50 % above the recent mean): warn and name "
        "the rows; skip, rollback and stop as for on_nonfinite, without updating the weights",
        "损失突增时（比近期均值高 6 个标准差以上，且高出 50% 以上）：warn 警告并指出样本；"
        "其余同 on_nonfinite，跳过该步，不更新权重",
    )
    allow_targets: list[str] = knob(
        "classes of your own that a configuration may name: my_parts.* or whole names; only on the command line",
        "允许配置引用的自有类：my_parts.* 或完整类名；只能在命令行给出",
    )
    trust_remote_code: bool = knob(
        "run the Python files that a model's folder brings; only on the command line, after reading them",
        "运行模型目录自带的 Python 代码；只能在命令行给出，请先阅读其代码",
    )
    on_tracker_error: Literal["stop", "continue"] = knob(
        "what to do when a tracker cannot start", "指标上报工具无法启动时：stop 停止，continue 继续"
    )

    # Config groups. A new one needs this entry, conf/<group>/ and a line in the defaults list of conf/train.yaml.
    model: Node = group(
        "the model family's facts: template, stop tokens; chosen by the model's own model_type unless typed",
        "模型系列的信息：模板、停止符；未指定时按模型自身的 model_type 选择",
        "sftx.model.loading.family: Family",
    )
    mode: Node = group(
        "what is trained",
        "训练哪些参数",
        "sftx.model.modes: Full Lora QLora",
        per_trial=True,
    )
    data: Node = group(
        "how the corpus is read",
        "如何读取语料",
        "sftx.data.corpus: Corpus",
    )
    optimizer: Node = group(
        "the optimizer",
        "优化器",
        "sftx.training.optimizers: AdamW Lion Adafactor Sgd",
        per_trial=True,
    )
    scheduler: Node = group(
        "the learning-rate schedule",
        "学习率调度",
        "sftx.training.schedulers: Constant ConstantWithWarmup Cosine CosineWithRestarts Cyclic Exponential "
        "InverseSqrt Polynomial ReduceOnPlateau Step WarmupStableDecay",
        per_trial=True,
    )
    precision: Node = group(
        "number formats of the computation",
        "计算精度",
        "sftx.training.precision: Precision",
    )
    parallel: Node = group(
        "one process or several",
        "单进程或多进程",
        "sftx.parallel.settings: Single Ddp Zero3",
    )
    tracker: dict[str, Node] = group(
        "where metrics are shown",
        "指标上报",
        "sftx.runs.trackers: TensorBoard Wandb",
        per_trial=True,
    )
    callback: dict[str, Node] = group(
        "training callbacks",
        "训练回调",
        "sftx.training.callbacks: EarlyStopping GenerateSamples LogBatches Profile",
        per_trial=True,
    )


TYPES = get_type_hints(TrainConfig, include_extras=True)
KNOBS = {f.name: f for f in fields(TrainConfig) if "components" not in f.metadata}
GROUPS = {f.name: f for f in fields(TrainConfig) if "components" in f.metadata}
COMPONENTS = frozenset(name for group in GROUPS.values() for name in group.metadata["components"])
"""The classes that a configuration may instantiate without permission."""
PER_TRIAL = frozenset(f.name for f in fields(TrainConfig) if f.metadata["per_trial"])
LIST_GROUPS = frozenset(name for name in GROUPS if TYPES[name] != Node)
"""Groups of which several options can be chosen at once: `tracker=[tensorboard,wandb]`."""
OVERLAYS = {
    "experiment": ("ready-made configurations", "现成的配置"),
    "sweep": ("ready-made sweeps, from sweeps/", "sweeps/ 中现成的超参搜索"),
    "debug": ("debugging presets", "调试预设"),
}
"""Groups that hold no component but set keys everywhere; `null` unless chosen."""

assert all(f.default is MISSING for f in fields(TrainConfig)), "defaults belong in conf/train.yaml"
