"""Small concepts and settings, made from the pack under test."""


def concept(pack, name="dog", **more):
    return pack("fmn.concept").Concept(name, **more)


def settings(pack, **more):
    return pack("fmn.methods.resteer").Settings(**{"steps": 3, "lr": 0.002} | more)
