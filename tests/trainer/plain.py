"""The game of a training run once more, from the models' own logits in float64: no chunks, no selection, no package.

`Recorder` keeps the rows and the weights of each optimizer step; what follows recomputes from these alone.
"""

from types import SimpleNamespace

import torch

from tests.trainer.runs import pair, weights
from trl_kd import AMMTrainer


SOURCES = ("off_policy", "on_policy")


class Recorder(AMMTrainer):
    """Keeps, for each optimizer step: critics and student before it, and its rows with their rollouts."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.record = []

    def get_batch_samples(self, *args):
        before = {"critics": weights(self.auxiliary.modules), "student": weights(self.model)}
        batches, count = super().get_batch_samples(*args)
        if batches:
            rows = []
            for batch in batches:
                for i, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
                    ids, labels = (batch[name][i, :length] for name in ("input_ids", "labels"))
                    rows.append((ids.clone(), labels.tolist(), bool(batch["is_on_policy"][i])))
            self.record.append(SimpleNamespace(**before, rows=rows))
        return batches, count

    def critics_after(self, step):
        """Critics when the optimizer step is over."""
        return self.record[step + 1].critics if step + 1 < len(self.record) else weights(self.auxiliary.modules)


def normalised(hidden):
    return hidden / hidden.square().mean(-1, keepdim=True).sqrt()


def read(trainer, tokenizer, step):
    """The student of a step, and by source its trained tokens: probabilities, features, labels, positions, row."""
    student, teacher = (model.double() for model in pair(tokenizer))
    student.load_state_dict(trainer.record[step].student)
    found = {}
    for number, (ids, labels, on_policy) in enumerate(trainer.record[step].rows):
        seen = student(ids[None], output_hidden_states=True)
        with torch.no_grad():
            known = teacher(ids[None], output_hidden_states=True)
        trained = [i for i in range(len(labels) - 1) if labels[i + 1] != -100]
        part = {
            "log_s": seen.logits[0].log_softmax(-1)[trained],
            "log_t": known.logits[0].log_softmax(-1)[trained],
            "x_s": normalised(seen.hidden_states[-1][0, trained].detach()),
            "x_t": normalised(known.hidden_states[-1][0, trained]),
            "labels": torch.tensor([labels[i + 1] for i in trained]),
            "positions": torch.arange(len(trained)),
            "row": torch.full((len(trained),), number),
        }
        found.setdefault(SOURCES[on_policy], []).append(part)
    tokens = {}
    for source, parts in found.items():
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        joined["features"] = {
            "teacher": joined["x_t"],
            "student": joined["x_s"],
            "both": torch.cat([joined["x_t"], joined["x_s"]], dim=-1),
        }[trainer.args.critic_features]
        joined["discount"] = trainer.args.gamma ** joined["positions"].double()
        tokens[source] = SimpleNamespace(**joined)
    return student, tokens


def embeddings_of(tokenizer):
    return pair(tokenizer)[1].get_output_embeddings().weight.detach().double()


def critic_values(parameters, source, features, embeddings, args):
    """f at some tokens; `parameters` are those of all critics."""
    weight, size = parameters[f"{source}.weight"].double(), features.shape[1]
    if args.critic_head == "full":
        z = 8 / size * features @ weight.T
    elif args.critic_head == "low_rank":
        projection = parameters[f"{source}.projection"].double()
        z = 8 / len(projection) * (features @ projection.T / size) @ weight.T
    else:
        variance, directions = torch.linalg.eigh(embeddings.T @ embeddings / len(embeddings))
        whitening = directions @ torch.diag(variance**-0.5) @ directions.T
        z = 80 / weight.numel() * features @ weight.T @ whitening @ embeddings.T
    return args.critic_bound * torch.tanh(z)


def moments(tokens, values):
    return ((tokens.log_t.exp() - tokens.log_s.exp()) * values).sum(-1)


def objective(tokens, values, args):
    """Mean of what a critic ascends, over the tokens of its own source."""
    p_t, p_s = tokens.log_t.exp(), tokens.log_s.detach().exp()
    penalty = args.critic_penalty / 2 * ((p_t + p_s) / 2 * values**2).sum(-1)
    return (tokens.discount * (((p_t - p_s) * values).sum(-1) - penalty)).mean()


def total_variation(tokens):
    return (tokens.log_t.exp() - tokens.log_s.exp()).abs().sum(-1) / 2


def norm(gradients):
    return torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm().item()
