"""On-policy self-distillation in a loop of your own, with nothing of fastsd but its kernels.

    python examples/hand_written_loop.py --model HuggingFaceTB/SmolLM2-135M-Instruct --steps 5

The student answers a question, the same model reads a hint and judges each token of that answer,
and the student is moved towards it: KL(S||T) on its own tokens, no [T, V] logits anywhere.
Axes: G responses, L positions, T tokens that count, D hidden, V vocabulary.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastsd_kernels import fused_linear_loss
from fastsd_kernels.adapters.hidden_states import head_weight, hidden_states

QUESTION = "What is 17 + 26? Answer with the number."
HINT = "17 + 26 = 43."


def prompt_ids(tokenizer, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered, add_special_tokens=False).input_ids


def predicting_states(model, prompt: list[int], responses: list[list[int]]) -> torch.Tensor:
    """[T, D]: for each response token, the hidden state that predicts it."""
    longest = max(map(len, responses))
    ids_GL = torch.zeros(len(responses), len(prompt) + longest, dtype=torch.long)
    mask_GL = torch.zeros_like(ids_GL)
    for row, response in enumerate(responses):
        whole = prompt + response
        ids_GL[row, : len(whole)], mask_GL[row, : len(whole)] = torch.tensor(whole), 1
    hidden_GLD = hidden_states(model, ids_GL, mask_GL)
    first = len(prompt) - 1
    return torch.cat(
        [h_LD[first : first + len(r)] for h_LD, r in zip(hidden_GLD, responses, strict=True)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--lr", type=float, default=1e-5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    question = prompt_ids(tokenizer, QUESTION)
    with_hint = prompt_ids(tokenizer, f"{QUESTION}\n\n{HINT}")

    for step in range(arguments.steps):
        out = model.generate(
            torch.tensor([question]),
            attention_mask=torch.ones(1, len(question), dtype=torch.long),
            do_sample=True,
            num_return_sequences=arguments.samples,
            max_new_tokens=arguments.max_new_tokens,
            pad_token_id=-1,
        )
        responses = [[i for i in row if i >= 0] for row in out[:, len(question) :].tolist()]
        student_TD = predicting_states(model, question, responses)
        with torch.no_grad():
            teacher_TD = predicting_states(model, with_hint, responses)
        target_T = torch.tensor([i for response in responses for i in response])
        found = fused_linear_loss(
            student_TD,
            head_weight(model),
            target_T,
            teacher_TD=teacher_TD,
            divergence="reverse_kl",  # KL(student || teacher), over the whole vocabulary
            divergence_weight_T=torch.full((len(target_T),), 1 / len(target_T)),
        )
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        advantage_T = found.teacher_logprob_T - found.student_logprob_T
        print(
            f"step {step}: KL(S||T) {found.loss.item():.6f} nats a token, "
            f"mean log T - log S {advantage_T.mean().item():+.4f} ({found.impl})"
        )


if __name__ == "__main__":
    main()
