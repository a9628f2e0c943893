"""The training step of a network, for Lightning."""

import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from rfield.layers import ReceptiveFieldRegulator
from rfield.layers.dilation import Pair
from rfield.search import (
    NARROWINGS,
    GradientSearch,
    SampledSearch,
    Search,
    SpsaSearch,
    class_share_loss,
    factor_parameters,
    learned_layers,
)
from rfield.search.factors import mean_over_processes
from rfield.search.sets import PathLogits
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import IGNORE_INDEX, EpochSampler
from rfield.segmentation.files.format import file_format
from rfield.segmentation.inference.predict import feature_logits, predict_logits
from rfield.segmentation.metrics import confusion_matrix, segmentation_scores
from rfield.segmentation.models import MultiPathHead, ParsingNetwork
from rfield.segmentation.training.distributed import refuse_unequal
from rfield.segmentation.training.fields import present_field
from rfield.segmentation.training.losses import make_loss, norm_over_processes
from rfield.segmentation.training.optimizer import make_optimizer
from rfield.segmentation.training.run_folder import save_search_weights
from rfield.segmentation.training.search_phase import SearchPhase

Batch = tuple[Tensor, Tensor]
# The paths drift apart if one's logits exceed so many times those of their sum, or exceed the second number.
_DRIFT, _LARGEST_LOGITS = 5.0, 50.0


class ParsingModule(L.LightningModule):
    """The training step: the loss, the poly schedule, and a learning rate of its own for the factors.

    Args:
        network: what to train.
        config: resolved.
        class_names: the classes' names.
        held_out: the batches on which a sampled search evaluates its curve.
        class_groups: the classes of each path, which guide its receptive field.
        class_weights: the weight of each class in the loss; `config.optim.class_weights` may only say how to find them.
        reading_weights: the weight of each class in the curve of a sampled search, Tensor[num_classes]; None makes the
            curve one of the loss.

    Raises:
        ValueError: the loss does not fit the weights or the classes, or needs a package that is missing.
    """

    def __init__(
        self,
        network: ParsingNetwork,
        config: TrainConfig,
        class_names: tuple[str, ...],
        held_out: Iterable[Batch] = (),
        class_groups: Sequence[tuple[int, ...]] | None = None,
        class_weights: Sequence[float] | None = None,
        reading_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        # Plain types only, so that a checkpoint loads with weights_only.
        self.save_hyperparameters({"config": config.plain(), "class_names": list(class_names)})
        self.network = network
        self.config = config
        self.class_names = class_names
        self.confusion = confusion_matrix(len(class_names))
        self.regulators = [module for module in network.modules() if isinstance(module, ReceptiveFieldRegulator)]
        self.factor_gradients: tuple[float, float] | None = None
        self.held_out = held_out
        self.guides = (class_groups or ()) if config.search.path_guidance == "search" else ()
        self.criterion = make_loss(config.optim.loss, len(class_names), class_weights, config.optim.label_smoothing)
        self.class_weights = class_weights
        self.reading_weights = reading_weights
        self.factor_start = 0
        self.search: Search | None = None
        self.phase = SearchPhase.DONE if config.search.search == "none" else SearchPhase.SEARCHING
        self.search_seconds = 0.0
        self.step_loss = self.mean_loss = torch.zeros(())  # Read by the callbacks.
        self._drifting = False
        # The last batch, whether its features have a graph, and the features.
        self._seen: tuple[Batch, bool, tuple[Tensor, ...]] | None = None
        # The last batch whose paths were read, and the logits of each path and dilation.
        self._paths_seen: tuple[Batch, dict[tuple[int, Pair], Tensor]] | None = None
        self._search_state: dict[str, Any] | None = None
        if config.model.freeze_backbone:
            network.backbone.requires_grad_(False)
        if isinstance(network.head, MultiPathHead) and config.model.shared_kernel != "never":
            network.head.share_kernels()

    def on_fit_start(self) -> None:
        for regulator in self.regulators:
            regulator.record_gradients = True

    def on_train_epoch_start(self) -> None:
        self._freeze()

    def _freeze(self) -> None:
        if self.config.model.freeze_backbone:
            self.network.backbone.eval()

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        # Dropout depends on seed, step and process alone, so that a resumed epoch repeats itself. A seed per epoch
        # would not do: in a resumed run the loader may draw random numbers before the hook instead of after it.
        seeds = np.random.SeedSequence([self.config.run.seed, self.global_step, self.global_rank])
        torch.manual_seed(int(seeds.generate_state(1)[0]))

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of a batch, at the dilations that the search asks for."""
        self.factor_gradients = None
        if self.trainer.world_size > 1:
            batch = self._without_repeats(batch, batch_index)
        loss = self._loss(self.network, batch) if self.search is None else self.search.loss(batch)
        self._seen = None
        self.step_loss = loss.detach()
        self.mean_loss = mean_over_processes(self.step_loss)
        self.log("loss", self.mean_loss, prog_bar=True)
        return loss

    def _without_repeats(self, batch: Batch, batch_index: int) -> Batch:
        """Remove the repeated samples that fill up an epoch's last batch, or their labels if all are repeated."""
        input, mask = batch
        kept = ~torch.tensor(self._sampler.repeated(batch_index * self._share, len(mask)), device=mask.device)
        return (input[kept], mask[kept]) if kept.any() else (input, torch.full_like(mask, IGNORE_INDEX))

    def _loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the loss over the batch's labelled pixels."""
        logits, mask = self._logits(network, batch)
        return self.criterion(logits, mask)

    def _guided_loss(self, network: nn.Module, batch: Batch) -> Tensor | tuple[Tensor, Tensor]:
        """Return the loss and each factor's own loss: the cross-entropy, in which its path's classes weigh more."""
        assert self.search is not None
        logits, mask = self._logits(network, batch)
        loss = self.criterion(logits, mask)
        reading = isinstance(self.search, SampledSearch)
        if reading and torch.is_grad_enabled():
            return loss  # A step at a drawn dilation trains only the weights.
        losses = F.cross_entropy(logits, mask, ignore_index=IGNORE_INDEX, reduction="none")
        if reading and self.reading_weights is not None:
            losses = losses * self.reading_weights.to(mask.device)[mask.clamp(max=len(self.class_names) - 1)]
        if self.guides:
            owned = [torch.isin(mask, torch.tensor(group, device=mask.device)) for group in self.guides]
            weighted = [losses * torch.where(own, self.config.search.path_weight, 1.0) for own in owned]
        else:
            weighted = [losses] * len(self.search.groups)
        count = norm_over_processes((mask != IGNORE_INDEX).sum())
        return loss, torch.stack([path.sum() / count for path in weighted])

    def _read_paths(self, network: nn.Module, batch: Batch) -> PathLogits:
        """Return each path's logits at the labelled pixels of a batch, where the loss is taken."""
        assert isinstance(network, ParsingNetwork)
        assert isinstance(network.head, MultiPathHead)
        input, mask, output_size = self._target(network, batch)
        features = input if self.config.model.freeze_backbone else self._features(network, input, batch)[0]
        labelled = mask != IGNORE_INDEX
        if self._paths_seen is None or self._paths_seen[0] is not batch:
            self._paths_seen = batch, {}
        logits = []
        for index, path in enumerate(network.head.heads()):
            key = index, path.realised_dilation  # Paths with few candidates are asked for the same ones again.
            if key not in self._paths_seen[1]:
                self._paths_seen[1][key] = path(features, output_size).float().movedim(1, -1)[labelled]
            logits.append(self._paths_seen[1][key])
        target = mask[labelled].long()
        classes = torch.ones(len(self.class_names)) if self.reading_weights is None else self.reading_weights
        weight = classes.to(target.device)[target]
        owned = [torch.isin(target, target.new_tensor(group)) for group in self.guides]
        guided = [weight * torch.where(own, self.config.search.path_weight, 1.0) for own in owned]
        return PathLogits(logits, target, weight, guided)

    @torch.no_grad()
    def chances(self, batches: Iterable[Batch]) -> list[float]:
        """Return for each factor the loss of predicting the classes' shares everywhere, as the search evaluates it.

        Args:
            batches: the held-out images, one each.

        Raises:
            ValueError: no pixel that the loss sees has a label.
        """
        masks = [self._target(self.network, batch)[1] for batch in batches]
        classes, factors = len(self.class_names), len(learned_layers(self.network))
        counts = torch.stack([mask[mask != IGNORE_INDEX].bincount(minlength=classes) for mask in masks]).cpu()
        if not counts.any():
            raise ValueError("no pixel of the held-out images has a label where the loss is taken")
        if self._reads_cross_entropy:
            weights = torch.ones(classes) if self.reading_weights is None else self.reading_weights
            if not self.guides:
                return [class_share_loss(counts, weights)] * factors
            guides = []
            for group in self.guides:
                guide = weights.clone()
                guide[list(group)] *= self.config.search.path_weight
                guides.append(class_share_loss(counts, guide))
            return guides
        weighted = counts * counts.new_tensor(self.class_weights or [1.0] * classes, dtype=torch.float64)
        kept = weighted[weighted.sum(1) > 0]
        shares = (kept / kept.sum(1, keepdim=True)).mean(0)
        logits = shares.clamp(min=1e-12).log().float().to(masks[0].device)[None, :, None, None]
        losses = [float(self.criterion(logits.expand(-1, -1, *mask.shape[1:]), mask)) for mask in masks]
        return [sum(losses) / len(losses)] * factors

    def _logits(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits and labels where the loss is taken."""
        assert isinstance(network, ParsingNetwork)
        input, mask, output_size = self._target(network, batch)
        if not self.config.model.freeze_backbone:
            return network.logits_of(self._features(network, input, batch), output_size, mask).float(), mask
        if isinstance(network.head, MultiPathHead):
            return network.head(input, output_size, mask).float(), mask
        return network.head(input, output_size).float(), mask

    def _target(self, network: ParsingNetwork, batch: Batch) -> tuple[Tensor, Tensor, tuple[int, int] | None]:
        """Return the network's input, the labels where the loss is taken, and their size (None: the feature grid)."""
        input, mask = (part.to(self.device) for part in batch)
        input = input.contiguous(memory_format=torch.channels_last)
        frozen = self.config.model.freeze_backbone
        input = input.float() if frozen else network.pad(input)
        height, width = ((size - 1) * network.stride + 1 if frozen else size for size in input.shape[2:])
        mask = F.pad(mask, (0, width - mask.shape[2], 0, height - mask.shape[1]), value=IGNORE_INDEX)
        output_size = None
        if self.config.optim.loss_resolution == "features":
            mask = mask[:, :: network.logit_stride, :: network.logit_stride]
        else:
            output_size = (mask.shape[1], mask.shape[2])
        return input, mask, output_size

    def _features(self, network: ParsingNetwork, input: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Return a batch's features; a search that tries several dilations on a batch has them computed once."""
        seen = self._seen
        if seen is None or seen[0] is not batch or seen[1] != torch.is_grad_enabled():
            self._seen = seen = batch, torch.is_grad_enabled(), network.features(input)
        return seen[2]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if learned := [regulator for regulator in self.regulators if regulator.log_factor.requires_grad]:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            scale = scaler.get_scale() if scaler is not None else 1.0
            terms = [regulator.pop_factor_gradients() for regulator in learned]
            sums = torch.stack([torch.stack([part.sum() for part in each]) for each in terms]).sum(0)
            inflation, interpolation = (mean_over_processes(sums) / scale).tolist()
            self.factor_gradients = inflation, interpolation
        head = self.network.head
        if isinstance(head, MultiPathHead):
            for index in head.silent:
                for parameter in head.heads()[index].parameters():
                    parameter.grad = None  # other processes may have sent zeros, which would still decay the weights
            shared = self.config.model.shared_kernel
            if shared == "always" or (shared == "search" and self.phase is SearchPhase.SEARCHING):
                head.share_gradients()
        if self.global_step < self.factor_start:
            for factor in factor_parameters(self.network):
                factor.grad = None

    def end_step(self) -> None:
        """Log the factor, then do the search's part of the step; the callback `SearchStep` calls it."""
        factor, _, field = present_field(self.network)
        self.log_dict({"factor": factor, "rf_px": field}, prog_bar=True)
        self._warn_of_drift()
        if self.search is not None and self.phase is SearchPhase.SEARCHING:
            started = time.monotonic()
            with self.trainer.precision_plugin.train_step_context():
                self.search.step()
            self._seen = self._paths_seen = None
            self.search_seconds += time.monotonic() - started
            if self.search.done:
                self.phase = SearchPhase.HOLDING_OUT
                if isinstance(self.search, SampledSearch):
                    self._end_sampled_search(self.search)

    def _end_sampled_search(self, search: SampledSearch) -> None:
        """Save the weights that work at all dilations, and leave out the paths that were not chosen."""
        if self.config.run.save_search_weights and self.trainer.is_global_zero:
            save_search_weights(self.config, self.network, search.averaged.weights)
        if isinstance(self.network.head, MultiPathHead):
            self.network.head.leave_out(search.left_out)

    def _warn_of_drift(self) -> None:
        """Warn once if the published guidance drives the paths apart."""
        head = self.network.head
        if self._drifting or not isinstance(head, MultiPathHead) or head.path_logits is None:
            return
        *paths, total = head.path_logits.tolist()
        if max(paths) > min(_DRIFT * max(total, _DRIFT), _LARGEST_LOGITS):
            self._drifting = True
            warnings.warn(
                f"step {self.global_step}: the paths' logits drift apart, {max(paths):.3g} in root mean square where "
                f"their sum has {total:.3g}; weighted gradients of summed paths have no joint rest point. Use "
                "path_guidance search, a smaller path_weight, or fewer steps with more weight decay",
                stacklevel=2,
            )

    def on_train_start(self) -> None:
        self._freeze()  # `on_train_epoch_start` does not run if the run resumes inside an epoch.
        if isinstance(self.network.head, MultiPathHead):
            self.network.head.find_silent()
        # Not earlier: freezing factors changes the optimizer's groups, and its state has been loaded only now.
        if self._search_state is not None:
            self.search_seconds = self._search_state["seconds"]
            if self.search is not None:
                self.search.load_state_dict(self._search_state["search"])
            else:  # The search has ended. A factor that could not be snapped must be frozen again.
                for group in learned_layers(self.network):
                    group[0].freeze_factor()

    def on_train_epoch_end(self) -> None:
        factors = factor_parameters(self.network)
        if self.trainer.world_size > 1 and factors:
            refuse_unequal(torch.cat([factor.detach() for factor in factors]).exp(), f"step {self.global_step}")
        if self.phase is SearchPhase.HOLDING_OUT:
            self._sampler.held_out = frozenset()
            self.phase = SearchPhase.DONE

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.network.spec is not None:
            checkpoint["rfield"] = {**file_format(), "network": self.network.spec.plain(), "fused": None}
        state = self._search_state and self._search_state["search"]
        if self.search is not None:
            state = self.search.state_dict()
        if state is not None:
            checkpoint["search"] = {
                "search": state,
                "seconds": self.search_seconds,
                "holding_out": self.phase is not SearchPhase.DONE,
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._search_state = checkpoint.get("search")
        self.phase = SearchPhase.saved_in(checkpoint)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Score one image, or one image's cached features, at the image's own size."""
        input, mask = batch[0][0], batch[1][0]
        if self.config.model.freeze_backbone:
            logits = feature_logits(self.network, input, (mask.shape[0], mask.shape[1]))
        else:
            logits = predict_logits(self.network, input)
        self.confusion.update(logits.argmax(0), mask)

    def on_validation_epoch_end(self) -> None:
        scores = segmentation_scores(self.confusion.compute(), self.class_names)
        # All processes compute the score of the same matrix, since they must agree on the best checkpoint.
        self.log("miou", scores["miou"] or 0.0, prog_bar=True, sync_dist=True)
        self.confusion.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        config = self.config
        steps = int(self.trainer.estimated_stepping_batches)
        self.factor_start = steps // 10 if config.search.factor_start is None else config.search.factor_start
        self.search = self._make_search(max(1, round((config.search.search_share or 1.0) * steps)))
        optimizer = make_optimizer(self.network, config)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps) ** 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def _sampler(self) -> EpochSampler:
        loader: Any = self.trainer.train_dataloader
        assert isinstance(loader.sampler, EpochSampler)
        return loader.sampler

    @property
    def _share(self) -> int:
        """Number of images per step in each process."""
        return (self.config.optim.batch_size or 1) // self.trainer.world_size

    @property
    def _reads_cross_entropy(self) -> bool:
        """Whether a sampled search evaluates a cross-entropy of its own, and not the training loss."""
        return bool(self.guides) or self.reading_weights is not None

    def _make_search(self, steps: int) -> Search | None:
        kind, seed = self.config.search.search, self.config.run.seed
        if self.phase is not SearchPhase.SEARCHING:
            return None
        loss = self._guided_loss if self.guides or (kind == "sampled" and self._reads_cross_entropy) else self._loss
        if kind == "gradient":
            return GradientSearch(self.network, loss, steps, seed)
        if kind == "spsa":
            return SpsaSearch(self.network, loss, steps, seed)
        narrowings = NARROWINGS if self.config.search.search_narrowing else {}
        summed = isinstance(self.network.head, MultiPathHead) and self.network.decoder is None  # which is not linear
        read_paths = self._read_paths if summed else None
        fewest = self.config.model.paths == "auto"
        return SampledSearch(
            self.network, loss, steps, self.held_out, seed, narrowings, read_paths=read_paths, fewest=fewest
        )
