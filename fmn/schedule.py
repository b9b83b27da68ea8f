"""The forward process that every family shares."""


def add_noise(clean, noise, alpha_cumprod):
    """x_t of a clean latent (Ho et al. 2020, eq. 4).

    Args:
        clean, noise: [B, 4, h, w]. alpha_cumprod: [B], the product of alphas up to each t.
    """
    alpha_cumprod = alpha_cumprod.view(-1, 1, 1, 1)
    return alpha_cumprod.sqrt() * clean + (1 - alpha_cumprod).sqrt() * noise
