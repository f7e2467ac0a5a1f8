"""Stands in for jaxtyping where a registered model is used: annotations become the plain tensor type."""


class _Plain:
    def __class_getitem__(cls, item):
        return item[0]


def __getattr__(name: str) -> type:
    return _Plain
