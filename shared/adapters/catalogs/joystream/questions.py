"""The questions to the squid, in the words of each generation of servers.

Servers differ in two things: the name of the query for one object (`storageDataObjectById`, once
`storageDataObjectByUniqueInput`), and the type of ids in their inputs (`String`, once `ID`). A server refuses a
question in the wrong words when it validates it, before anything is looked up.
"""

from __future__ import annotations

from dataclasses import dataclass

_TYPE = "type { ... on DataObjectTypeVideoSubtitle { subtitle { mimeType } } }"
_OBJECT = f"""{{
  id size ipfsHash isAccepted {_TYPE}
  storageBag {{
    storageBuckets {{ storageBucket {{
      id operatorMetadata {{ nodeEndpoint }} operatorStatus {{ __typename }}
    }} }}
    distributionBuckets {{ distributionBucket {{ id operators {{ workerId status }} }} }}
  }}
}}"""


@dataclass(frozen=True, slots=True)
class Dialect:
    """One generation of servers. `one_object`: the field for one object, its argument over `$id`; `id_type`: of ids."""

    name: str
    one_object: str
    argument: str
    id_type: str


DIALECTS = (
    Dialect("by_id", "storageDataObjectById", "id: $id", "String"),
    Dialect("by_unique_input", "storageDataObjectByUniqueInput", "where: {id: $id}", "String"),
    Dialect("by_unique_input_id", "storageDataObjectByUniqueInput", "where: {id: $id}", "ID"),
)


@dataclass(frozen=True, slots=True)
class Query:
    """`text` may hold `%(one_object)s`, `%(argument)s` and `%(id_type)s` of a dialect; `operation` is its name."""

    operation: str
    text: str

    def render(self, dialect: Dialect) -> str:
        return self.text % {
            "one_object": dialect.one_object,
            "argument": dialect.argument,
            "id_type": dialect.id_type,
        }


ONE_OBJECT = Query(
    "DataObject",
    # The alias makes the answers of all servers alike.
    "query DataObject($id: %(id_type)s!) { object: %(one_object)s(%(argument)s) " + _OBJECT + " }",
)
BAGS_OF_BUCKETS = Query(
    "BagsOfBuckets",
    "query BagsOfBuckets($ids: [%(id_type)s!]) {"
    " distributionBuckets(where: {id_in: $ids}) { id bags { bag { id } } } }",
)
BAGS_OF_WORKER = Query(
    "BagsOfWorker",
    "query BagsOfWorker($w: Int!) {"
    " distributionBuckets(where: {operators_some: {workerId_eq: $w, status_eq: ACTIVE}}) { id bags { bag { id } } } }",
)
ALL_BAGS = Query("AllBags", "query AllBags { distributionBuckets { id bags { bag { id } } } }")
ALL_BUCKETS = Query("AllBuckets", "query AllBuckets { distributionBuckets { id } }")
OBJECTS_OF_BAGS = Query(
    "ObjectsOfBags",
    "query ObjectsOfBags($ids: [%(id_type)s!], $n: Int!) {"
    " storageBags(where: {id_in: $ids}, limit: $n) { id objects { id size ipfsHash " + _TYPE + " } } }",
)
ACTIVE_STORAGE = Query(
    "ActiveStorage",
    "query ActiveStorage { storageBuckets("
    'where: {operatorStatus: {isTypeOf_eq: "StorageBucketOperatorStatusActive"}})'
    " { id operatorMetadata { nodeEndpoint } } }",
)
STATUS = Query("Status", "query Status { squidStatus { height } squidVersion { version } }")
