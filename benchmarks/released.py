"""The loops that others released, written out again literally: what ours are measured against.

Both work on a diffusers pipeline with nothing of ``fmn`` in it, and yield once a step.
"""

import copy
import random

import torch

PROMPT = "a photo of {}"
TILL = 2, 8  # steps drawn before a step of ESD, the first of them twice


class WatchedAttention:
    """An attention processor that keeps the whole matrix of probabilities."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        attn.probabilities = attn.get_attention_scores(query, key, attention_mask)
        output = attn.batch_to_head_dim(torch.bmm(attn.probabilities, value))
        return attn.to_out[1](attn.to_out[0](output))


def forget_me_not(pipeline, name, size):
    """SHI-Labs/Forget-Me-Not, attention re-steering with its default settings.

    float32; all of the U-Net is trained, by AdamW with a gradient clip; each step encodes a picture
    and the prompt anew; end-of-text tokens count as the concept's (``use_pooler``). Textual
    inversion, 500 steps that come first by default there, is left out.
    """
    unet, vae, device = pipeline.unet, pipeline.vae, pipeline.device
    scheduler, tokenizer = pipeline.scheduler, pipeline.tokenizer
    for part in (vae, pipeline.text_encoder):
        part.requires_grad_(False)
    unet.requires_grad_(True).train()
    modules = [module for path, module in unet.named_modules() if path.endswith("attn2")]
    for module in modules:
        module.set_processor(WatchedAttention())
    adamw = torch.optim.AdamW(
        unet.parameters(), lr=2e-6, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8
    )
    ids = tokenizer(PROMPT.format(name), padding="max_length", return_tensors="pt").input_ids
    words = tokenizer(name, add_special_tokens=False).input_ids
    flags = (ids[0] == tokenizer.eos_token_id) | torch.isin(ids[0], torch.tensor(words))
    flags, ids = flags.to(device), ids.to(device)
    picture = torch.rand(1, 3, size, size, device=device) * 2 - 1
    steps = scheduler.config.num_train_timesteps
    while True:
        with torch.no_grad():
            latents = vae.encode(picture).latent_dist.sample() * vae.config.scaling_factor
            text = pipeline.text_encoder(ids)[0]
        noise = torch.randn_like(latents)
        t = torch.randint(0, steps, (1,), device=device)
        alpha = scheduler.alphas_cumprod.to(device)[t].view(-1, 1, 1, 1)
        unet(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, t, encoder_hidden_states=text)
        watched = [module.probabilities[:, :, flags].flatten() for module in modules]
        loss = torch.cat(watched).norm()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        for module in modules:
            module.probabilities = None
        yield float(loss)


def esd(pipeline, name, size, dtype=torch.bfloat16):
    """rohitgandikota/erasing as of 2025, esd_sd.py with esd-x and its default settings.

    bfloat16; a frozen U-Net and one in training, of which Adam is given the cross-attention, but
    all of which gets gradients. The released code draws 1024 pixels, and up to a random one of 50
    steps; here the size is the others', and ``TILL`` says up to which.
    """
    pipeline = pipeline.to(dtype)
    frozen, device = pipeline.unet.requires_grad_(False), pipeline.device
    trained = copy.deepcopy(frozen).requires_grad_(True)
    parameters = [
        parameter
        for path, module in trained.named_modules()
        if "attn2" in path and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        for parameter in module.parameters()
    ]
    adam = torch.optim.Adam(parameters, lr=5e-5)
    with torch.no_grad():
        concept, empty = pipeline.encode_prompt(name, device, 1, True, "")
    alphas = pipeline.scheduler.alphas_cumprod.to(device)
    times = torch.linspace(len(alphas) - 1, 0, 50).round().long().tolist()
    number = 0
    while True:
        adam.zero_grad()
        count, number = TILL[max(0, number - 1) % len(TILL)], number + 1
        generator = torch.Generator().manual_seed(random.randint(0, 2**15))
        x = torch.randn(1, 4, size // 8, size // 8, generator=generator).to(device, dtype)
        with torch.no_grad():
            for now, following in zip(times[:count], times[1:]):
                both = torch.cat([empty, concept])
                without, having = frozen(torch.cat([x, x]), now, both).sample.float().chunk(2)
                noise = without + 3 * (having - without)
                a, b = alphas[now], alphas[following]
                clean = (x - (1 - a).sqrt() * noise) / a.sqrt()
                x = (b.sqrt() * clean + (1 - b).sqrt() * noise).to(dtype)
            having, without = (frozen(x, times[count], text).sample for text in (concept, empty))
        predicted = trained(x, times[count], concept).sample
        loss = torch.nn.functional.mse_loss(predicted, having - 2 * (having - without))
        loss.backward()
        adam.step()
        yield float(loss)
