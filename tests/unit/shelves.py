"""What lies in the folders of the shelf's tests."""


def files(folder):
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def named(shelf):
    return {entry["name"]: entry for entry in shelf.entries()}
