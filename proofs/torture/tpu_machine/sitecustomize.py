"""Makes JAX believe that it is on a TPU machine, where the environment tells of a pod."""

import jax._src.clusters.cloud_tpu_cluster as pods
import jax._src.clusters.cluster as clusters

pods.running_in_cloud_tpu_vm = clusters.running_in_cloud_tpu_vm = True
