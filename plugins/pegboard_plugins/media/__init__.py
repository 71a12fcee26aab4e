"""Library for vision data authors: opening images, tiles, frames, and references to them; no hooks.

parts       what a message's content part names
listed      what a record lists beside its messages
places      where a reference may point: paths under a root, `data:` URLs, bytes
images      one picture -> RGB, upright; its size from the header alone
tiling      which grid of tiles a size gets, and the tiles as uint8
frames      frames of a folder, an animated picture or a video
references  what a token store keeps of a sample's media, and pixels from it
"""
