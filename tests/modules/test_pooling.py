import torch

from torchrl_sql.modules import GlobalAveragePooling, LearnedSpatialEmbedding


def test_spatial_embedding_is_a_weighted_sum_over_space():
    pooling = LearnedSpatialEmbedding(2, 2, 2, num_embeddings=2)
    weight = torch.tensor([[[[1.0, 2], [3, 4]], [[1, 0], [0, 0]]], [[[0, 0], [0, 1]], [[-1, 1], [-1, 1]]]])
    pooling.weight.data.copy_(weight)
    x = torch.tensor([[[[1.0, 1], [1, 2]], [[5, 6], [7, 8]]]])
    # Channel 0: 1+2+3+8 and 2; channel 1: 5 and -5+6-7+8. Channels outermost.
    torch.testing.assert_close(pooling(x), torch.tensor([[14.0, 2, 5, 2]]))


def test_spatial_embedding_keeps_position_and_average_does_not():
    x = torch.zeros(2, 1, 3, 3)
    x[0, 0, 0, 0] = x[1, 0, 2, 2] = 1
    average = GlobalAveragePooling()(x)
    assert average.shape == (2, 1)
    torch.testing.assert_close(average[0], average[1])
    embedded = LearnedSpatialEmbedding(1, 3, 3, num_embeddings=4)(x)
    assert embedded.shape == (2, 4)
    assert (embedded[0] - embedded[1]).abs().max() > 1e-3
