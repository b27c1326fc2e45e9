"""The part of a Storage-Squid's schema that distributor nodes use, for each generation of squids."""

from __future__ import annotations

from functools import cache

from graphql import GraphQLSchema, build_schema

_BY_ID = "storageDataObjectById(id: String!): StorageDataObject"
_BY_UNIQUE = "storageDataObjectByUniqueInput(where: StorageDataObjectWhereUniqueInput!): StorageDataObject"
_DEPRECATED = f'{_BY_UNIQUE} @deprecated(reason: "use storageDataObjectById")'

_MANY = (
    "storageDataObjects(where: StorageDataObjectWhereInput, orderBy: [StorageDataObjectOrderByInput!], limit: Int): "
    "[StorageDataObject!]!"
)

BIGINT_WORKER = "bigint_worker"
"""The generation in which the ids of workers are a BigInt, so decimal strings in answers."""

# Each generation: its queries for objects, and the type of a worker's id.
GENERATIONS = {
    "current": (f"{_BY_ID}\n  {_DEPRECATED}\n  {_MANY}", "Int"),
    "without_deprecated": (f"{_BY_ID}\n  {_MANY}", "Int"),
    "deprecated_only": (f"{_BY_UNIQUE}\n  {_MANY}", "Int"),
    "without_batches": (_BY_ID, "Int"),
    BIGINT_WORKER: (f"{_BY_ID}\n  {_DEPRECATED}\n  {_MANY}", "BigInt"),
    "without_workers": (f"{_BY_ID}\n  {_MANY}", "Boolean"),  # a type that none of our queries has
}

_SDL = """
type Query {
  %(objects)s
  distributionBuckets(where: DistributionBucketWhereInput, limit: Int): [DistributionBucket!]!
  storageBags(where: StorageBagWhereInput, limit: Int): [StorageBag!]!
  storageBuckets(where: StorageBucketWhereInput, limit: Int): [StorageBucket!]!
  squidStatus: SquidStatus
  squidVersion: SquidVersion!
}

input StorageDataObjectWhereUniqueInput { id: String! }
input StorageDataObjectWhereInput { id_in: [String!], id_gt: String, storageBag: StorageBagWhereInput }
enum StorageDataObjectOrderByInput { id_ASC id_DESC }
input StorageBagWhereInput { id_in: [String!] }
input DistributionBucketWhereInput { id_in: [String!], operators_some: DistributionBucketOperatorWhereInput }
input DistributionBucketOperatorWhereInput {
  workerId_eq: %(worker_id)s
  status_eq: DistributionBucketOperatorStatus
}
input StorageBucketWhereInput { id_in: [String!], operatorStatus: StorageBucketOperatorStatusWhereInput }
input StorageBucketOperatorStatusWhereInput { isTypeOf_eq: String }

scalar BigInt

type StorageDataObject {
  id: ID!
  size: BigInt!
  ipfsHash: String!
  isAccepted: Boolean!
  type: DataObjectType
  storageBag: StorageBag!
}
union DataObjectType = DataObjectTypeVideoMedia | DataObjectTypeVideoSubtitle | DataObjectTypeUnknown
type DataObjectTypeVideoMedia { isTypeOf: String }
type DataObjectTypeVideoSubtitle { subtitle: VideoSubtitle }
type DataObjectTypeUnknown { isTypeOf: String }
type VideoSubtitle { id: ID!, mimeType: String! }

type StorageBag {
  id: ID!
  objects: [StorageDataObject!]!
  storageBuckets: [StorageBucketBag!]!
  distributionBuckets: [DistributionBucketBag!]!
}
type StorageBucketBag { bag: StorageBag!, storageBucket: StorageBucket! }
type DistributionBucketBag { bag: StorageBag!, distributionBucket: DistributionBucket! }

type StorageBucket {
  id: ID!
  operatorMetadata: StorageBucketOperatorMetadata
  operatorStatus: StorageBucketOperatorStatus!
}
type StorageBucketOperatorMetadata { id: ID!, nodeEndpoint: String }
union StorageBucketOperatorStatus =
  StorageBucketOperatorStatusActive | StorageBucketOperatorStatusInvited | StorageBucketOperatorStatusMissing
type StorageBucketOperatorStatusActive { workerId: %(worker_id)s! }
type StorageBucketOperatorStatusInvited { workerId: %(worker_id)s! }
type StorageBucketOperatorStatusMissing { isTypeOf: String }

type DistributionBucket {
  id: ID!
  operators: [DistributionBucketOperator!]!
  bags: [DistributionBucketBag!]!
}
type DistributionBucketOperator { id: ID!, workerId: %(worker_id)s!, status: DistributionBucketOperatorStatus! }
enum DistributionBucketOperatorStatus { ACTIVE INVITED }

type SquidStatus { height: Int }
type SquidVersion { version: String! }
"""


@cache
def schema_of(generation: str) -> GraphQLSchema:
    """The schema of one of GENERATIONS."""
    objects, worker_id = GENERATIONS[generation]
    return build_schema(_SDL % {"objects": objects, "worker_id": worker_id})
