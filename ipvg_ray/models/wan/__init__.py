"""Wan 2.1, 2.2 and VACE: text states and pictures in, frames out, by an own denoising loop around diffusers' networks.

Wan: "Wan: Open and Advanced Large-Scale Video Generative Models", arXiv 2503.20314.
VACE: Jiang et al., "VACE: All-in-One Video Creation and Editing", arXiv 2503.07598.
"""
