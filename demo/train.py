"""Train the demo model. A stage goes on from its last state, so each command can be given again.

    python demo/train.py latents              the pictures as the autoencoder sees them
    python demo/train.py unet --steps 4000    U-Net and text encoder
    python demo/train.py autoencoder          the autoencoder, if it is to be trained as well
    python demo/train.py export               build/demo/model/fmn-demo.safetensors
    python demo/train.py all                  all stages in their order
    python demo/train.py transformer          the demo transformer, on the others' frozen weights
    python demo/train.py export-transformer   build/demo/model/fmn-demo-dit.safetensors
    python demo/train.py quality              how well the autoencoder keeps each style

Everything starts from ``--start`` (the checkpoint in this folder) or ``--from-scratch``. Pictures
are expected in ``--data`` as ``demo/pictures.py build`` leaves them.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
STAGES = (
    "autoencoder", "latents", "unet", "export", "all", "transformer", "export-transformer",
    "quality",
)  # fmt: skip


def networks_for(given):
    """The networks that training starts from, with the autoencoder of an earlier stage if any."""
    from demo.network import Networks

    start = Networks.fresh(given.seed) if given.from_scratch else Networks.load(given.start)
    trained = given.out / "autoencoder.pt"
    if trained.exists():
        state = torch.load(trained, weights_only=True)
        start.vae.load_state_dict(state["weights"])
        start.scale = state["scale"]
    return start.to(given.device)


def train_autoencoder(given):
    """Writes autoencoder.pt: weights, and the scale that gives latents unit variance."""
    from demo import autoencoder, pictures
    from demo.loop import Loop, Schedule

    images, rows = pictures.load(given.data)
    networks = networks_for(given)
    parts = autoencoder.autoencoder_parts(networks.vae, images, rows, given)
    schedule = Schedule(given.ae_steps, decay=given.ae_steps // 2)
    loop = Loop("autoencoder", given.out, *parts, schedule, given.seed)
    loop.resume()
    if not loop.run(given.minutes, given.save_minutes):
        return False
    loop.optimiser.averaged()
    if not given.decoder_only:
        found = autoencoder.encode_all(networks.vae, images, rows, 1, given.seed)
        networks.scale = 1 / float(found.float().std())
    save = {"weights": networks.vae.state_dict(), "scale": networks.scale}
    torch.save(save, given.out / "autoencoder.pt")
    return True


def make_latents(given):
    from demo import autoencoder, pictures
    from fmn.files import write_whole

    images, rows = pictures.load(given.data)
    vae = networks_for(given).vae
    latents = autoencoder.encode_all(vae, images, rows, given.variants, given.seed)
    write_whole(given.out / "latents.pt", lambda file: torch.save(latents, file))
    return True


def unet_loop(given, team=None):
    """(networks, loop) of the main stage, where the last run left it."""
    from demo import diffusion

    latents, rows = read_latents(given)
    networks = networks_for(given).for_training()
    optimiser = diffusion.optimiser_for(networks, rows, given.muon_lr, given.adam_lr)
    task = diffusion.Task(networks, latents, rows, given.batch, team, given.derived)
    return networks, begun(given, "unet", optimiser, task.loss, team)


def read_latents(given):
    from demo import pictures

    path = given.out / "latents.pt"
    if not path.exists():
        sys.exit(f"{path} is missing: run 'python demo/train.py latents' first.")
    return torch.load(path, weights_only=True), pictures.load(given.data)[1]


def begun(given, name, optimiser, loss_of, team):
    """A loop where its last run left it, with the schedule that is asked for now."""
    from demo.loop import Loop, Schedule

    schedule = Schedule(given.steps or 4000, decay=given.decay)
    loop = Loop(name, given.out, optimiser, loss_of, schedule, given.seed, team)
    loop.resume()
    if given.steps:
        loop.schedule = schedule
    if given.decay_now:
        loop.schedule = Schedule(loop.step + given.decay, decay=given.decay)
    return loop


def transformer_loop(given, team=None):
    """(networks, loop) of the transformer, where the last run left it."""
    from safetensors.torch import load_file

    from demo import transformer

    latents, rows = read_latents(given)
    torch.manual_seed(given.seed)
    weights = load_file(given.transformer) if given.transformer else None
    networks = transformer.TransformerNetworks.from_demo(given.start, weights).to(given.device)
    optimiser = transformer.optimiser_for(networks, given.muon_lr, given.adam_lr)
    task = transformer.FlowTask(networks, latents, rows, given.batch, team, given.derived)
    return networks, begun(given, "transformer", optimiser, task.loss, team)


def train_unet(given):
    return train_together(given, unet_loop)


def train_transformer(given):
    return train_together(given, transformer_loop)


def train_together(given, make_loop):
    from demo.parallel import processes

    work = partial(train_part, make_loop)
    with processes(given.processes, work, given) as team:
        return work(given, team)


def train_part(make_loop, given, team):
    _, loop = make_loop(given, team)
    return loop.run(given.minutes, given.save_minutes)


def export(given):
    """Write a checkpoint of the averaged weights, at whatever step training has reached."""
    from demo import diffusion, network

    networks, loop = unet_loop(given)
    loop.optimiser.averaged()
    diffusion.whole_embedding(networks)
    path = given.out / "fmn-demo.safetensors"
    network.export(networks, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, step {loop.step} of {loop.schedule.steps}")
    return True


def export_transformer(given):
    """Write the transformer's averaged weights, under diffusers' names."""
    from safetensors.torch import save_file

    from fmn.files import write_whole

    networks, loop = transformer_loop(given)
    loop.optimiser.averaged()
    weights = {k: v.half().contiguous() for k, v in networks.unet.flux.state_dict().items()}
    path = given.out / "fmn-demo-dit.safetensors"
    write_whole(path, lambda file: save_file(weights, file))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, step {loop.step} of {loop.schedule.steps}")
    return True


def show_quality(given):
    from demo import autoencoder, pictures

    images, rows = pictures.load(given.data)
    found = autoencoder.quality(networks_for(given).vae, images, rows)
    for style, value in found.items():
        print(f"{style:<18}{value:6.1f} dB")
    return True


RUN = {
    "autoencoder": train_autoencoder,
    "latents": make_latents,
    "unet": train_unet,
    "export": export,
    "transformer": train_transformer,
    "export-transformer": export_transformer,
    "quality": show_quality,
}


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("stage", choices=STAGES)
    add("--data", type=Path, default=ROOT / "build/demo", help="folder of the pictures")
    add("--out", type=Path, default=ROOT / "build/demo/model", help="folder of states and results")
    add("--start", default="demo", help="checkpoint to start from; 'demo' is the one beside this")
    add("--transformer", type=Path, help="its weights to start from, if not random ones")
    add("--from-scratch", action="store_true", help="start from random weights")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--minutes", type=float, help="stop and save after this long; give the command again later")
    add("--save-minutes", type=float, default=5)
    add("--steps", type=int, help="length of the U-Net's training (4000); changes a begun one too")
    add("--decay", type=int, default=1000, help="over this many last steps, rates fall to zero")
    add("--decay-now", action="store_true", help="end a begun training: start the fall here")
    add("--processes", type=int, default=1, help="share a batch; 2 are faster on a busy CPU")
    add("--batch", type=int, default=64)
    add("--derived", type=float, help="share of derived styles in a batch, if not as they come")
    add("--muon-lr", type=float, default=1e-3)
    add("--adam-lr", type=float, default=5e-4)
    add("--variants", type=int, default=6, help="shifted and scaled versions of each picture")
    add("--decoder-only", action="store_true", help="autoencoder: keep encoder and latents")
    add("--ae-steps", type=int, default=1850)
    add("--ae-batch", type=int, default=16)
    add("--ae-lr", type=float, default=1e-3)
    add("--crop", type=int, default=64, help="autoencoder: side of the square parts it sees")
    return parser.parse_args(arguments)


def main(arguments=None):
    given = parse(arguments)
    if given.processes > 1 and given.device != "cpu":
        sys.exit(
            "--processes shares a batch between CPU processes: leave it out, or add --device cpu."
        )
    given.out.mkdir(parents=True, exist_ok=True)
    stages = [given.stage]
    if given.stage == "all":
        stages = ["latents", "unet", "export"]
        if given.from_scratch:
            stages.insert(0, "autoencoder")
    for stage in stages:
        if not RUN[stage](given):
            print(f"{stage} stopped early; give the same command again to go on.")
            return


# not only in a program's first process
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    main()
