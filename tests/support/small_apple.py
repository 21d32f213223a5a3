"""The names of Apple's mobileclip_s0.pt, written down from the layout of its towers, not from our mapping."""

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
AFFINE = ("weight", "bias")


def names(prefix, *parts):
    """Names of ``prefix`` joined to parts: a plain name, or a pair (name, its leaves)."""
    for part in parts:
        if isinstance(part, tuple):
            yield from (f"{prefix}{part[0]}.{leaf}" for leaf in part[1])
        else:
            yield f"{prefix}{part}"


def branch(name):
    """A convolution without bias and its BatchNorm."""
    return (f"{name}.conv", ("weight",)), (f"{name}.bn", BN)


def image_names(depths):
    """Apple's names of the MCi0 image tower with these numbers of blocks per stage."""
    conv, scale, skip = branch("rbr_conv.0"), branch("rbr_scale"), ("rbr_skip", BN)
    se = ("se.reduce", AFFINE), ("se.expand", AFFINE)
    ffn = *branch("convffn.conv"), ("convffn.fc1", AFFINE), ("convffn.fc2", AFFINE)
    yield from names("patch_embed.0.", *conv, *scale)
    yield from names("patch_embed.1.", *conv, *scale)  # a block that halves the image has no skip branch
    yield from names("patch_embed.2.", *conv, skip)
    for stage, depth in enumerate(depths[:3]):
        for block in range(depth):
            root = f"network.{2 * stage}.{block}."
            yield from names(root + "token_mixer.mixer.", *conv, *scale, skip)
            yield from names(root, ("token_mixer.norm.rbr_skip", BN), "token_mixer.layer_scale", *ffn, "layer_scale")
        root = f"network.{2 * stage + 1}.proj."
        yield from names(root + "0.", *branch("lkb_origin"), *branch("small_conv"), *(se if stage else ()))
        yield from names(root + "1.", *conv, skip)
    yield from names("network.6.pe.", *AFFINE)
    for block in range(depths[3]):
        yield from names(
            f"network.7.{block}.",
            ("norm", BN),
            "token_mixer.qkv.weight",
            ("token_mixer.proj", AFFINE),
            "layer_scale_1",
            "layer_scale_2",
            *ffn,
        )
    yield from names("conv_exp.", *conv, *scale, *se)
    yield "head.proj"


def text_names():
    """Apple's names of the mct text tower."""
    yield from names("", "embedding_layer.weight", "positional_embedding.pos_embed.pos_embed")
    for block in (0, 5):
        yield from names(
            f"transformer.{block}.",
            ("token_mixer.norm.rbr_skip", BN),
            ("token_mixer.mixer.rbr_skip", BN),
            *branch("token_mixer.mixer.rbr_conv.0"),
            "token_mixer.layer_scale",
            *branch("convffn.conv"),
            ("convffn.fc1", AFFINE),
            ("convffn.fc2", AFFINE),
            "layer_scale",
        )
    for layer in range(1, 5):
        parts = ("pre_norm_mha.0", "pre_norm_mha.1.qkv_proj", "pre_norm_mha.1.out_proj")
        ffn = ("pre_norm_ffn.0", "pre_norm_ffn.1", "pre_norm_ffn.4")
        yield from names(f"transformer.{layer}.", *((part, AFFINE) for part in parts + ffn))
    yield from names("", ("final_layer_norm", AFFINE), "projection_layer")


def released_names(depths):
    """All names of the released file."""
    image = [f"image_encoder.model.{name}" for name in image_names(depths)]
    return [*image, *(f"text_encoder.{name}" for name in text_names()), "logit_scale"]
