"""ncpvae"""
