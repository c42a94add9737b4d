"""Makes an image with a pipeline that `linfusion-run export-triton` laid out and Triton Inference Server serves.

    pip install "tritonclient[grpc]" tokenizers
    python triton_client.py sd15.linfusion --prompt "a lighthouse in a storm" -o lighthouse.png

Stable Diffusion 1, 2 and XL. The server runs the models; this program has the tokenizer, the loop and DDIM
(Song et al. 2021, eq. 12 with sigma = 0), so the server needs no loop (BLS) and keeps no state between requests.
"""

import argparse
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpc
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype


def clip_tokenizer(folder):
    """CLIP's tokenizer from vocab.json and merges.txt, as far as prompts need it."""
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:] if line]
    bpe = models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, vocab["<|startoftext|>"], vocab["<|endoftext|>"]


def token_ids(pipeline, part, texts):
    """[texts, length]: begin, tokens, end, padding; what is too long is cut."""
    tokenizer, begin, end = clip_tokenizer(pipeline / part)
    settings = json.loads((pipeline / part / "tokenizer_config.json").read_text(encoding="utf-8"))
    length = settings["model_max_length"]
    pad = settings.get("pad_token", "<|endoftext|>")
    pad = tokenizer.token_to_id(pad if isinstance(pad, str) else pad["content"])
    rows = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids[: length - 2]
        ids = [begin, *ids, end]
        rows.append(ids + [pad] * (length - len(ids)))
    return np.array(rows)


class Served:
    """A model on the server, called with arrays by name."""

    def __init__(self, client, name):
        self.client, self.name = client, name
        metadata = client.get_model_metadata(name)
        self.inputs = {i.name: (i.datatype, list(i.shape)) for i in metadata.inputs}

    def __call__(self, **arrays):
        inputs = []
        for name, (datatype, shape) in self.inputs.items():
            array = np.asarray(arrays[name])
            if array.ndim == 0:
                # A time step: one for each row where the model is batched, else one.
                rows = len(arrays["sample"]) if shape[0] == -1 else 1
                array = np.full([rows] + [1] * (len(shape) - 1), array)
            array = np.ascontiguousarray(array, dtype=triton_to_np_dtype(datatype))
            tensor = grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        result = self.client.infer(self.name, inputs)
        return {o.name: result.as_numpy(o.name).astype(np.float32) for o in result.get_response().outputs}


def encode(client, pipeline, texts):
    """What the UNet is conditioned on, one row a text: hidden states, and SD-XL's pooled text."""
    ids = token_ids(pipeline, "tokenizer", texts)
    if not (pipeline / "text_encoder_2").is_dir():
        return Served(client, "text_encoder")(input_ids=ids)["last_hidden_state"], None
    both = Served(client, "text")(input_ids=ids, input_ids_2=token_ids(pipeline, "tokenizer_2", texts))
    return np.concatenate([both["hidden_states"], both["hidden_states_2"]], axis=2), both["text_embeds"]


def ddim(config, count):
    """Time steps, and of each the products of 1 - beta before and after it."""
    train = config["num_train_timesteps"]
    if config["beta_schedule"] != "scaled_linear" or config.get("timestep_spacing", "leading") != "leading":
        raise SystemExit("this client knows the schedule `scaled_linear` with the spacing `leading` only")
    betas = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, train) ** 2
    alphas = np.cumprod(1 - betas)
    last = 1.0 if config.get("set_alpha_to_one", True) else alphas[0]
    stride = train // count
    for step in reversed(range(count)):
        time = step * stride + config.get("steps_offset", 0)
        before = time - stride
        yield time, alphas[time], alphas[before] if before >= 0 else last


def generate(client, pipeline, arguments):
    height, width = arguments.height, arguments.width
    latents = np.load(arguments.latents) if arguments.latents else None
    if latents is None:
        latents = np.random.default_rng(arguments.seed).standard_normal((1, 4, height // 8, width // 8))
    latents = latents.astype(np.float32)
    height, width = latents.shape[2] * 8, latents.shape[3] * 8

    hidden, pooled = encode(client, pipeline, [arguments.negative, arguments.prompt])
    conditions = {"encoder_hidden_states": hidden}
    if pooled is not None:
        sizes = [height, width, 0, 0, height, width]
        conditions |= {"text_embeds": pooled, "time_ids": np.array([sizes, sizes])}

    unet = Served(client, "unet")
    config = json.loads((pipeline / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    for time, alpha, alpha_next in ddim(config, arguments.steps):
        out = unet(sample=np.concatenate([latents, latents]), timestep=np.array(time), **conditions)
        negative, positive = np.split(next(iter(out.values())), 2)
        predicted = negative + arguments.guidance * (positive - negative)
        if config.get("prediction_type", "epsilon") == "v_prediction":
            image = alpha**0.5 * latents - (1 - alpha) ** 0.5 * predicted
            noise = alpha**0.5 * predicted + (1 - alpha) ** 0.5 * latents
        else:
            image = (latents - (1 - alpha) ** 0.5 * predicted) / alpha**0.5
            noise = predicted
        if config.get("clip_sample", True):
            image = np.clip(image, -config.get("clip_sample_range", 1.0), config.get("clip_sample_range", 1.0))
        latents = (alpha_next**0.5 * image + (1 - alpha_next) ** 0.5 * noise).astype(np.float32)

    vae = json.loads((pipeline / "vae_decoder" / "config.json").read_text(encoding="utf-8"))
    out = Served(client, "vae_decoder")(latent_sample=latents / vae.get("scaling_factor", 0.18215))
    pixels = next(iter(out.values()))[0].transpose(1, 2, 0)
    return (np.clip(pixels / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)


def write_png(path, pixels):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="the pipeline's folder, for its tokenizers and configurations")
    parser.add_argument("--server", default="localhost:8001", help="host and gRPC port")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative", default="")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="of NumPy's generator, which is not PyTorch's")
    parser.add_argument("--latents", type=Path, help="begin with these, a .npy file, instead")
    parser.add_argument("-o", "--output", type=Path, default=Path("out.png"))
    arguments = parser.parse_args()
    with grpc.InferenceServerClient(arguments.server) as client:
        write_png(arguments.output, generate(client, arguments.pipeline, arguments))


if __name__ == "__main__":
    main()
