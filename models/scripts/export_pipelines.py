#!/usr/bin/env python3
"""Makes the tiny pipelines of models/fixtures/pipelines, and the images that diffusers makes with them.

    python3 models/scripts/export_pipelines.py models/fixtures/pipelines [NAME ...]

Random weights, fixed seeds; the blocks and folders are those of real pipelines, laid out as optimum exports them
(unet or transformer, text encoders, VAE halves, tokenizers, scheduler, each model as model.onnx, here gzipped).
cases.json says what was asked for, golden.npz has the latents and the images, image.png the image that image-to-image
begins with. The case "ladder" is an image at the native size, enlarged by image-to-image with what the same generator draws next;
"tiled" is "i2i" with diffusers' tiled VAE. PixArt's tokenizer needs the package sentencepiece.
"""

import gzip
import importlib.util
import json
import pathlib
import sys
import tempfile
import warnings

import numpy as np
import torch
from diffusers import (
    AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PixArtSigmaPipeline,
    PixArtTransformer2DModel, PNDMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

HERE = pathlib.Path(__file__).parent
WORDS = """a photo of an astronaut riding a horse on mars, the quick brown fox jumps over the lazy dog. blurry,
low quality watercolor painting of mountains at sunset with a river in the foreground 4k it's they're
""".split()
PROMPTS = ["A photo of an astronaut riding a horse, it's 4k", "watercolor mountains at  sunset; café"]
NEGATIVE = "blurry, low quality"
TEXTS = [
    *PROMPTS, NEGATIVE, "", "  Tabs\tand\nlines ", "it's they'RE 12345 we'll", "emoji 🚀 and 日本語", "ÉCLAIR naïve ½ ﬁ",
    "a <|endoftext|> b", "!!! ... ,,, ((x:1.2))", " ".join(["astronaut riding"] * 20),
]
LENGTH = 24
SIZE = (192, 128)


def module(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def clip_tokenizer(folder, pad):
    """Byte pairs learned from WORDS, in the files that CLIP's tokenizer has."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges, pieces = [], [list(w[:-1]) + [w[-1] + "</w>"] for w in " ".join(WORDS).lower().split() if w.isalpha()]
    while len(merges) < 120:
        pairs = {}
        for word in pieces:
            for pair in zip(word, word[1:]):
                pairs[pair] = pairs.get(pair, 0) + 1
        if not pairs:
            break
        best = max(sorted(pairs), key=pairs.get)
        merges.append(best)
        for word in pieces:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    vocab = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    config = dict(
        tokenizer_class="CLIPTokenizer", bos_token="<|startoftext|>", eos_token="<|endoftext|>",
        unk_token="<|endoftext|>", pad_token=pad, model_max_length=LENGTH,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token=pad, model_max_length=LENGTH
    )
    return tokenizer


def clip_text(vocab, width, kind=CLIPTextModel, projection=16, layers=2, spread=8.0):
    config = CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=LENGTH, projection_dim=projection,
        bos_token_id=vocab.bos_token_id, eos_token_id=vocab.eos_token_id, pad_token_id=vocab.pad_token_id,
        attn_implementation="eager", initializer_factor=spread,
    )
    return kind(config).eval()


def vae(scale):
    model = AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2,
        latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=128, scaling_factor=scale,
    )
    return model.eval()


def write_onnx(folder, model, arguments, inputs, outputs, axes):
    folder.mkdir(parents=True, exist_ok=True)
    # The exporter puts back the mode that it found, for all parts: dropout would be on in what follows.
    model.eval()
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        raw = pathlib.Path(scratch, "model.onnx")
        torch.onnx.export(
            model, arguments, str(raw), input_names=inputs, output_names=outputs, dynamic_axes=axes,
            opset_version=18, dynamo=False,
        )
        (folder / "model.onnx.gz").write_bytes(gzip.compress(raw.read_bytes(), mtime=0))


def write_config(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    keep = {k: v for k, v in dict(config).items() if k != "_name_or_path"}
    (folder / "config.json").write_text(json.dumps(keep, indent=2, default=str))


class Call(torch.nn.Module):
    def __init__(self, run, parts):
        super().__init__()
        self.parts, self.run = torch.nn.ModuleList(parts), run

    def forward(self, *inputs):
        return self.run(*inputs)


def write_vae(root, model):
    image, latent = {0: "batch", 2: "height", 3: "width"}, {0: "batch", 2: "latent_height", 3: "latent_width"}
    write_onnx(
        root / "vae_decoder", Call(lambda z: model.decode(z, return_dict=False)[0], [model]),
        (torch.randn(2, 4, 4, 6),), ["latent_sample"], ["sample"], {"latent_sample": latent, "sample": image},
    )
    write_onnx(
        root / "vae_encoder", Call(lambda x: model.encode(x, return_dict=False)[0].parameters, [model]),
        (torch.randn(2, 3, 32, 48),), ["sample"], ["latent_parameters"],
        {"sample": image, "latent_parameters": latent},
    )
    for half in ("vae_decoder", "vae_encoder"):
        write_config(root / half, model.config)


def write_clip(folder, model, states):
    def run(ids):
        out = model(input_ids=ids, output_hidden_states=states, return_dict=True)
        first = [out.text_embeds, out.last_hidden_state] if hasattr(out, "text_embeds") else [out[0], out[1]]
        return tuple(first) + tuple(out.hidden_states or ())

    ids = torch.randint(0, 99, (2, LENGTH))
    names = ["text_embeds", "last_hidden_state"] if "Projection" in type(model).__name__ else ["last_hidden_state", "pooler_output"]
    with torch.no_grad():
        names += [f"hidden_states.{i}" for i in range(len(run(ids)) - 2)]
    axes = {"input_ids": {0: "batch", 1: "sequence"}, **{n: {0: "batch"} for n in names}}
    write_onnx(folder, Call(run, [model]), (ids,), ["input_ids"], names, axes)
    write_config(folder, model.config.to_dict())


def write_unet(root, unet, xl):
    names = ["sample", "timestep", "encoder_hidden_states"] + (["text_embeds", "time_ids"] if xl else [])

    def run(sample, timestep, text, *more):
        added = dict(zip(["text_embeds", "time_ids"], more)) or None
        return unet(sample, timestep, text, added_cond_kwargs=added, return_dict=False)[0]

    arguments = [torch.randn(2, 4, 16, 16), torch.tensor(500), torch.randn(2, LENGTH, unet.config.cross_attention_dim)]
    arguments += [torch.randn(2, 16), torch.randn(2, 6)] if xl else []
    image = {0: "batch", 2: "height", 3: "width"}
    axes = {n: {0: "batch"} for n in names if n != "timestep"} | {"sample": image, "out_sample": image}
    write_onnx(root / "unet", Call(run, [unet]), tuple(arguments), names, ["out_sample"], axes)
    write_config(root / "unet", unet.config)


def picture():
    width, height = SIZE
    y, x = np.mgrid[0:height, 0:width] / 40.0
    planes = [np.sin(3 * x + y), np.cos(2 * y - x), np.sin(x * y)]
    return Image.fromarray(np.stack([((p + 1) * 127.5).round() for p in planes], -1).astype(np.uint8))


def write_index(root, kind, parts, **more):
    library = dict(scheduler="diffusers", vae="diffusers", unet="diffusers", transformer="diffusers")
    index = {"_class_name": kind, "_diffusers_version": "0.42.1"}
    index |= {name: [library.get(name, "transformers"), type(part).__name__] for name, part in parts.items()}
    (root / "model_index.json").write_text(json.dumps(index | more, indent=2))
    parts["scheduler"].save_config(root / "scheduler")


def tokens(tokenizer, length):
    """Texts with the ids and masks that the pipeline's encoder gets."""
    rows = []
    for text in TEXTS:
        row = tokenizer(text, padding="max_length", max_length=length, truncation=True)
        rows.append(dict(text=text, ids=list(row["input_ids"]), mask=list(row["attention_mask"])))
    return rows


def write_tokens(root, length=LENGTH, **tokenizers):
    table = {name: tokens(tokenizer, length) for name, tokenizer in tokenizers.items()}
    (root / "tokens.json").write_text(json.dumps(table, ensure_ascii=False))


def finish(root, cases, golden):
    picture().save(root / "image.png")
    (root / "cases.json").write_text(json.dumps(cases, indent=1, ensure_ascii=False))
    np.savez_compressed(root / "golden.npz", **golden)


def run_cases(root, text_to_image, image_to_image, guidance, tiling_vae=None):
    """Text to image alone and two at once, image to image, in tiles too if there is a VAE for it, and an image that is enlarged."""
    cases, golden = {}, {}
    common = dict(guidance_scale=guidance, negative_prompt=NEGATIVE)
    plans = {
        "t2i": (text_to_image, dict(prompt=PROMPTS[0], num_inference_steps=4, width=SIZE[0], height=SIZE[1]), 7),
        "two": (text_to_image, dict(prompt=PROMPTS[1], num_inference_steps=3, width=128, height=128,
                                    num_images_per_prompt=2), 11),
        "plain": (text_to_image, dict(prompt=PROMPTS[1], num_inference_steps=2, width=128, height=128,
                                      guidance_scale=1.0), 3),
        "i2i": (image_to_image, dict(prompt=PROMPTS[0], num_inference_steps=5, strength=0.6, image=picture()), 5),
    }
    if tiling_vae:
        plans["tiled"] = plans["i2i"]
    for name, (run, asked, seed) in plans.items():
        asked = {**common, **asked}
        kept = {}
        if name == "tiled":
            tiling_vae.enable_tiling()
            asked["vae_tile"] = tiling_vae.tile_sample_min_size

        def remember(pipe, step, timestep, tensors):
            kept[step] = tensors["latents"].clone()
            return {}

        options = {k: v for k, v in asked.items() if k != "vae_tile"}
        result = run(**options, generator=torch.Generator("cpu").manual_seed(seed), remember=remember, kept=kept)
        if name in ("t2i", "i2i", "tiled"):
            golden[f"{name}.image"] = result
        golden[f"{name}.latents"] = kept[max(kept)].numpy()
        if "image" in asked:
            asked["image"] = "image.png"
        cases[name] = asked | {"seed": seed}
        if name == "tiled":
            tiling_vae.disable_tiling()
        print(root.name, name, result.shape, result.std().round(1), golden[f"{name}.latents"].std())
    cases["ladder"] = ladder(text_to_image, image_to_image, dict(**common, num_inference_steps=10), golden)
    finish(root, cases, golden)


def ladder(text_to_image, image_to_image, common, golden):
    """SDEdit: the image of the native size, resized as diffusers resizes images, is changed by 0.4."""
    asked = dict(prompt=PROMPTS[0], **common)
    seed, kept = 23, {}

    def remember(*_):
        return {}

    generator = torch.Generator("cpu").manual_seed(seed)
    first = text_to_image(**asked, width=128, height=128, generator=generator, remember=remember, kept=kept)
    enlarged = Image.fromarray(first[0]).resize((256, 256), Image.LANCZOS)
    second = image_to_image(
        **asked, image=enlarged, strength=0.4, generator=generator, remember=remember, kept=kept
    )
    golden["ladder.image"] = second
    print("ladder", first.std().round(1), second.std().round(1))
    return asked | dict(width=256, height=256, seed=seed)


def with_callback(pipe):
    def run(remember, kept, **asked):
        pipe.set_progress_bar_config(disable=True)
        images = pipe(**asked, output_type="pil", callback_on_step_end=remember).images
        return np.stack([np.asarray(i) for i in images])

    return run


def stable_diffusion(root, unet, scheduler, scale):
    tokenizer = clip_tokenizer(root / "tokenizer", "<|endoftext|>" if scale else "!")
    text = clip_text(tokenizer, 12)
    parts = dict(scheduler=scheduler, text_encoder=text, tokenizer=tokenizer, unet=unet, vae=vae(0.18215))
    kind = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    other = StableDiffusionImg2ImgPipeline(**kind.components, requires_safety_checker=False)
    write_index(root, "StableDiffusionPipeline", parts)
    write_tokens(root, tokenizer=tokenizer)
    write_clip(root / "text_encoder", text, states=False)
    write_unet(root, unet, xl=False)
    write_vae(root, parts["vae"])
    run_cases(root, with_callback(kind), with_callback(other), 7.5, tiling_vae=parts["vae"])


def sd15(root):
    unet = module("export_unet").sd15().eval()
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        set_alpha_to_one=False,
    )
    stable_diffusion(root, unet, scheduler, 1)


def sd21(root):
    unet = module("export_unet").sd21().eval()
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False,
        clip_sample=False, prediction_type="v_prediction",
    )
    stable_diffusion(root, unet, scheduler, 0)


def sdxl(root):
    unet = module("export_unet").sdxl().eval()
    tokenizers = [clip_tokenizer(root / n, p) for n, p in [("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")]]
    # Its states are not normalized: larger weights would make attention to text a matter of the last digit.
    texts = [
        clip_text(tokenizers[0], 4, spread=2.0),
        clip_text(tokenizers[1], 8, CLIPTextModelWithProjection, spread=2.0),
    ]
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    parts = dict(
        scheduler=scheduler, text_encoder=texts[0], text_encoder_2=texts[1], tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1], unet=unet, vae=vae(0.13025),
    )
    kind = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    other = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    write_index(root, "StableDiffusionXLPipeline", parts, force_zeros_for_empty_prompt=True)
    write_tokens(root, tokenizer=tokenizers[0], tokenizer_2=tokenizers[1])
    write_clip(root / "text_encoder", texts[0], states=True)
    write_clip(root / "text_encoder_2", texts[1], states=True)
    write_unet(root, unet, xl=True)
    write_vae(root, parts["vae"])
    run_cases(root, with_callback(kind), with_callback(other), 6.0)


def t5_tokenizer(folder):
    import sentencepiece
    from transformers import T5Tokenizer

    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        text = pathlib.Path(scratch, "text")
        text.write_text("\n".join([" ".join(WORDS)] + PROMPTS + WORDS))
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=f"{scratch}/spiece", vocab_size=90, model_type="unigram", pad_id=0, eos_id=1,
            unk_id=2, bos_id=-1, hard_vocab_limit=False, normalization_rule_name="nmt_nfkc",
        )
        (folder / "spiece.model").write_bytes(pathlib.Path(scratch, "spiece.model").read_bytes())
    config = dict(
        tokenizer_class="T5Tokenizer", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", extra_ids=4,
        model_max_length=512,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return T5Tokenizer.from_pretrained(str(folder))


def pixart(root):
    from transformers import T5Config, T5EncoderModel

    maker = module("export_pixart")
    tokenizer = t5_tokenizer(root / "tokenizer")
    text = T5EncoderModel(T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", attn_implementation="eager",
    )).eval()
    shape = {**maker.SIGMA_XL, "num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24}
    shape |= dict(caption_channels=16, sample_size=16, interpolation_scale=1)
    transformer = PixArtTransformer2DModel(num_layers=2, **shape).eval()
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    parts = dict(scheduler=scheduler, text_encoder=text, tokenizer=tokenizer, transformer=transformer, vae=vae(0.13025))
    pipe = PixArtSigmaPipeline(**parts)
    write_index(root, "PixArtSigmaPipeline", parts)
    write_tokens(root, 40, tokenizer=tokenizer)
    # Masks of ones only would be traced away.
    pair = (torch.randint(0, 60, (2, 300)), (torch.arange(300)[None] < torch.tensor([[300], [9]])).to(torch.int64))
    names = ["input_ids", "attention_mask"]
    axes = {n: {0: "batch", 1: "sequence"} for n in [*names, "last_hidden_state"]}
    write_onnx(
        root / "text_encoder", Call(lambda ids, mask: text(input_ids=ids, attention_mask=mask)[0], [text]), pair,
        names, ["last_hidden_state"], axes,
    )
    write_config(root / "text_encoder", text.config.to_dict())
    image, words = {0: "batch", 2: "height", 3: "width"}, {0: "batch", 1: "text"}
    names = ["sample", "encoder_hidden_states", "timestep", "encoder_attention_mask"]
    axes = dict(zip(names, [image, words, {0: "batch"}, words]), out_sample=image)
    example = list(maker.example(16, 16, 20))
    example[1] = torch.randn(2, 20, 16)
    write_onnx(root / "transformer", maker.Transformer(transformer), tuple(example), names, ["out_sample"], axes)
    write_config(root / "transformer", transformer.config)
    write_vae(root, parts["vae"])
    # The size of the image, not that of the traced example, decides the positions, as in the exported graph.
    wrapped = maker.Transformer(transformer)
    transformer.forward = lambda sample, encoder_hidden_states, timestep, encoder_attention_mask, **_: (
        wrapped(sample, encoder_hidden_states, timestep, encoder_attention_mask),
    )

    def finished(latents):
        picture = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
        images = pipe.image_processor.postprocess(picture.detach(), output_type="pil")
        return np.stack([np.asarray(i) for i in images])

    def generate(remember, kept, **asked):
        pipe.set_progress_bar_config(disable=True)
        options = dict(use_resolution_binning=False, clean_caption=False)
        latents = pipe(**asked, **options, output_type="latent").images
        kept[0] = latents
        return finished(latents)

    def from_image(remember, kept, image, strength, generator, num_inference_steps, prompt, negative_prompt, guidance_scale):
        """diffusers has no such pipeline for PixArt; this is that of Stable Diffusion with its parts."""
        text, mask, no_text, no_mask = pipe.encode_prompt(
            prompt, True, negative_prompt, clean_caption=False, max_sequence_length=300
        )
        text, mask = torch.cat([no_text, text]), torch.cat([no_mask, mask])
        start = pipe.image_processor.preprocess(image)
        latents = pipe.vae.encode(start).latent_dist.sample(generator) * pipe.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        scheduler.set_timesteps(num_inference_steps)
        first = num_inference_steps - min(int(num_inference_steps * strength), num_inference_steps)
        scheduler.set_begin_index(first)
        latents = scheduler.add_noise(latents, noise, scheduler.timesteps[first : first + 1])
        for step in scheduler.timesteps[first:]:
            both = wrapped(torch.cat([latents] * 2), text, step.expand(2), mask).chunk(2, dim=1)[0]
            negative, positive = both.chunk(2)
            guided = negative + guidance_scale * (positive - negative)
            latents = scheduler.step(guided, step, latents, return_dict=False)[0]
        kept[0] = latents
        return finished(latents)

    with torch.no_grad():
        run_cases(root, generate, from_image, 4.5)


def main():
    out, names = pathlib.Path(sys.argv[1]), sys.argv[2:]
    kinds = dict(sd15=sd15, sd21=sd21, sdxl=sdxl, pixart=pixart)
    for name in names or kinds:
        torch.manual_seed(0)
        root = out / name
        if root.exists():
            raise SystemExit(f"{root} is there already: remove it first")
        root.mkdir(parents=True)
        with torch.no_grad():
            kinds[name](root)


if __name__ == "__main__":
    main()
