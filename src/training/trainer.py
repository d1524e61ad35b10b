"""From the settings of conf/trainer to a Lightning Trainer."""

import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from torch import nn

from src.errors import UserError
from src.launch import launched, meeting_point
from src.memory import keep_freed
from src.models.norm import faster_channels_last
from src.training.compiling import worth_compiling
from src.training.masters import MasterWeights
from src.training.sharding import Sharded, blocks
from src.training.units import Steps
from src.training.writer import CheckpointWriter

Precision = Literal["auto", "32-true", "tf32", "bf16-mixed", "bf16-true", "16-mixed"]
if TYPE_CHECKING:
    Nodes = int  # what `num_nodes` is once the settings are made
else:
    Nodes = int | Literal["auto"]  # what a configuration may say


@dataclass(frozen=True)
class TrainerSettings:
    """How and on what a run trains; conf/trainer/auto.yaml says what each setting takes.

    Raises:
        ValueError: for a device that this machine has not, or a number out of range.
    """

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    devices: int | list[int] | Literal["auto"] = "auto"
    num_nodes: Nodes = "auto"  # type: ignore[assignment]
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    precision: Precision = "auto"
    max_steps: Steps = 10000
    accumulate_grad_batches: int = 1
    gradient_clip_norm: float | None = 1.0
    val_every_n_steps: Steps = 1000
    log_every_n_steps: Steps = 50
    compile: bool | Literal["auto"] = "auto"
    channels_last: bool | Literal["auto"] = "auto"
    deterministic: bool = False
    requeue_code: int | None = None

    def __post_init__(self) -> None:
        if self.num_nodes == "auto":
            launch = launched()
            object.__setattr__(self, "num_nodes", 1 if launch is None else launch.num_nodes)
        for name in ("max_steps", "accumulate_grad_batches", "val_every_n_steps", "log_every_n_steps", "num_nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.gradient_clip_norm is not None and self.gradient_clip_norm <= 0:
            raise ValueError(f"gradient_clip_norm={self.gradient_clip_norm} must be positive, or null for no clipping")
        gpus = torch.cuda.device_count()
        if self.accelerator == "gpu" and not gpus:
            raise ValueError(
                "accelerator=gpu asks for a GPU and this machine has none; use trainer=cpu or trainer=auto"
            )
        if self.accelerator == "mps" and not torch.backends.mps.is_available():
            raise ValueError("accelerator=mps asks for Apple's GPU and this machine has none; use trainer=cpu")
        wanted = max(self.devices, default=-1) + 1 if isinstance(self.devices, list | tuple) else self.devices
        if isinstance(wanted, int) and wanted < 1:
            raise ValueError(f"devices={self.devices} must be auto, a number from 1, or a list of GPU indices")
        if self.device_type == "cuda" and isinstance(wanted, int) and wanted > gpus:
            raise ValueError(f"devices={self.devices} asks for {wanted} GPUs and this machine has {gpus}")
        if self.device_type != "cuda" and isinstance(self.devices, list | tuple):
            raise ValueError(f"devices={list(self.devices)} are indices of GPUs and there are none; use devices=auto")
        if isinstance(self.devices, list | tuple) and len(set(self.devices)) < len(self.devices):
            raise ValueError(f"devices={list(self.devices)} name a GPU twice")
        self._check_precision()
        self._check_launch(gpus)
        if self.strategy == "fsdp":
            self._check_sharding()

    def _check_precision(self) -> None:
        """Refuses a precision that the device lacks."""
        if self.precision == "16-mixed" and self.device_type == "cpu":
            raise ValueError("precision=16-mixed needs a GPU; use bf16-mixed or 32-true on the CPU")
        if self.precision == "tf32" and (self.device_type != "cuda" or torch.cuda.get_device_capability() < (8, 0)):
            raise ValueError("precision=tf32 needs an NVIDIA GPU from Ampere on; use 32-true")
        if self.precision in ("bf16-mixed", "bf16-true") and self.device_type == "cuda" and not self._has_bf16:
            raise ValueError(f"precision={self.precision} needs a GPU that multiplies in bfloat16; use 16-mixed")

    def _check_sharding(self) -> None:
        """Refuses what fsdp cannot do."""
        if self.num_devices * self.num_nodes == 1:
            raise ValueError(
                "strategy=fsdp shares a network out over several devices and there is one; use trainer.strategy=auto"
            )
        if self.precision in ("bf16-true", "16-mixed"):
            raise ValueError(f"precision={self.precision} does not work with strategy=fsdp; use bf16-mixed")
        if self.channels_last is True:
            raise ValueError("channels_last=true does not work with strategy=fsdp; use channels_last=false")

    @property
    def _has_bf16(self) -> bool:
        """Whether the device multiplies in bfloat16 by itself."""
        if self.device_type == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return self.device_type == "cpu" and _cpu_has_bf16()

    def _check_launch(self, gpus: int) -> None:
        """Compares with what torchrun or srun started."""
        launch = launched()
        if launch is None:
            if self.num_nodes > 1:
                raise ValueError(
                    f"num_nodes={self.num_nodes} needs a launcher for the processes of all nodes: torchrun or srun"
                )
            return
        started = f"{launch.launcher} started {launch.world_size} processes, {launch.local_world_size} a node"
        if (self.num_devices, self.num_nodes) != (launch.local_world_size, launch.num_nodes):
            raise ValueError(
                f"devices={self.devices} and num_nodes={self.num_nodes} are not what runs: {started}; set "
                "trainer.devices=auto trainer.num_nodes=auto"
            )
        if self.device_type == "cuda" and self.num_devices > gpus:
            raise ValueError(
                f"{started} and this process sees {gpus} GPUs; start one process a GPU and let each see all of its "
                "node (of Slurm, --gpus-per-node and not --gpus-per-task)"
            )

    @property
    def device_type(self) -> Literal["cuda", "mps", "cpu"]:
        """What torch calls the device that will train."""
        if self.accelerator in ("auto", "gpu") and torch.cuda.is_available():
            return "cuda"
        if self.accelerator in ("auto", "mps") and torch.backends.mps.is_available():
            return "mps"
        return "cpu"

    @property
    def num_devices(self) -> int:
        """Devices of this machine that will train; of several processes that a launcher started, one each."""
        if isinstance(self.devices, list | tuple):
            return len(self.devices)
        if self.devices != "auto":
            return int(self.devices)
        launch = launched()
        if launch is not None:
            return launch.local_world_size
        return torch.cuda.device_count() if self.device_type == "cuda" else 1

    @property
    def chosen_precision(self) -> str:
        """`precision`, with auto as bf16-mixed where the hardware multiplies in bfloat16, and 32-true elsewhere."""
        if self.precision != "auto":
            return self.precision
        return "bf16-mixed" if self._has_bf16 else "32-true"

    @property
    def chosen_channels_last(self) -> bool:
        """`channels_last`, with auto as what is faster here."""
        if self.channels_last != "auto":
            return self.channels_last
        return self.strategy != "fsdp" and faster_channels_last(torch.device(self.device_type))

    @property
    def chosen_compile(self) -> bool:
        """`compile`, with auto as what is faster here over the whole run."""
        if self.compile != "auto":
            return self.compile
        return self.strategy != "fsdp" and worth_compiling(self.device_type, self.max_steps)

    @property
    def chosen(self) -> str:
        """Precision and what else of the network is not torch's default, in words."""
        words = {"channels-last": self.chosen_channels_last, "compiled": self.chosen_compile}
        return ", ".join([self.chosen_precision, *(word for word, is_so in words.items() if is_so)])

    @property
    def fused_optimizer(self) -> bool:
        """Whether the fused optimiser is right: it unscales gradients itself, too late for clipping under 16-mixed."""
        return self.chosen_precision != "16-mixed"

    def prepare(self, net: nn.Module) -> MasterWeights | None:
        """Sets the network's memory format and, of bf16-true, its type, and compiles it; all in place.

        Compiled so, its parameters keep their names. Of fsdp, whose weights come and go block by block, blocks are.

        Returns:
            the float32 weights of bf16-true.
        """
        if self.chosen_channels_last:
            net.to(memory_format=torch.channels_last)
        masters = MasterWeights(net) if self.chosen_precision == "bf16-true" else None
        if self.chosen_compile:
            torch._dynamo.reset()  # what a sweep's jobs before this one have compiled
            modules = list(blocks(net)) if self.strategy == "fsdp" else [net]
            for module in modules:
                module.compile()
            limits: Any = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, 4 * len(modules))  # all blocks are one code to it
        return masters

    def make(self, run_dir: Path, writer: CheckpointWriter, callbacks: list[Callback]) -> Trainer:
        """The Trainer: an endless epoch of max_steps, validated every so many steps and at the end."""
        quiet_lightning()
        if self.device_type == "cpu":
            keep_freed()
        torch.set_float32_matmul_precision("high" if self.chosen_precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = self.chosen_precision != "32-true"  # torch's default lets convolutions round
        processes = self.num_devices * self.num_nodes
        strategy: Any = "ddp" if self.strategy == "auto" and processes > 1 else self.strategy
        devices: Any = list(self.devices) if isinstance(self.devices, list | tuple) else self.num_devices
        trainer = Trainer(
            accelerator=self.accelerator,
            devices=devices,
            num_nodes=self.num_nodes,
            strategy=Sharded(processes) if self.strategy == "fsdp" else strategy,
            precision=self.chosen_precision if "mixed" in self.chosen_precision else "32-true",  # type: ignore[arg-type]
            max_steps=self.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=self.accumulate_grad_batches,
            val_check_interval=self.val_every_n_steps * self.accumulate_grad_batches,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=self.log_every_n_steps,
            deterministic=self.deterministic,
            benchmark=self.device_type == "cuda" and not self.deterministic,  # cuDNN tries its algorithms out
            logger=False,  # fit gives it its loggers when it has found nothing to refuse
            callbacks=callbacks,
            plugins=[writer, *_environment()],
            default_root_dir=run_dir,
            enable_checkpointing=False,
            enable_model_summary=False,
            inference_mode=False,  # no_grad does
            use_distributed_sampler=False,
        )
        # Signals are for `Stop`. Lightning's handler broadcasts wherever it is called, which several processes answer
        # by hanging, and each step it broadcasts whether one came, and waits for the answer.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        return trainer


def _environment() -> list[ClusterEnvironment]:
    """Where Lightning reads its rank: what `launched` saw, so that the two never disagree."""
    launch = launched()
    if launch is None:  # Lightning looks around itself, and takes Slurm's batch script for a task of srun
        return [LightningEnvironment()] if "SLURM_JOB_ID" in os.environ else []
    meeting_point()
    if launch.launcher != "srun":
        return [TorchElasticEnvironment()]
    os.environ["SLURM_NTASKS_PER_NODE"] = str(launch.local_world_size)  # which srun --ntasks leaves unset
    return [SLURMEnvironment(auto_requeue=False)]  # src/train.py does so, when the checkpoint is saved


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies in bfloat16 (AVX-512 BF16 or AMX); emulated, it is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def quiet_lightning() -> None:
    """Silences what Lightning says of its own accord; its errors stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")  # of 1x1 kernels


def refuse_ddp_sweep(settings: TrainerSettings) -> None:
    """Refuses several devices in one multirun process: each child of Lightning's launcher would start its own sweep."""
    if launched() is None and (settings.num_devices > 1 or settings.strategy != "auto"):
        raise UserError(
            f"trainer.devices={settings.devices}, trainer.strategy={settings.strategy} and --multirun do not work in "
            "one process; give each job one device (trainer.strategy=auto trainer.devices=1, several at a time with "
            f"hydra/launcher=joblib) or {settings.num_devices} processes of its own (hydra/launcher=submitit_slurm "
            f"hydra.launcher.tasks_per_node={settings.num_devices}), or call src.train without -m from a shell loop"
        )
