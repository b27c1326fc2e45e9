{{/* What the pods have in common. Each definition gets a dict: root (the chart's context), component, and what it names. */}}

{{- define "distributor.selector" -}}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/name: distributor-node
{{- end }}

{{/* `instance` names the node: the monitors make it the label `node` of all metrics. */}}
{{- define "distributor.labels" -}}
{{ with .component -}}
app.kubernetes.io/component: {{ . }}
{{ end -}}
app.kubernetes.io/name: distributor-node
{{ include "distributor.part" . }}
{{- end }}

{{- define "distributor.part" -}}
app.kubernetes.io/part-of: distributor-node
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- end }}

{{- define "distributor.image" -}}
{{ .root.Values.image.repository }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{/* Variables of all processes, one line each: the values' and those that follow from them. */}}
{{- define "distributor.settings" -}}
{{- $all := dict -}}
{{- if .Values.cells.enabled -}}
{{- $urls := list -}}
{{- range until (int .Values.cells.count) -}}
{{- $urls = append $urls (printf "http://distributor-cell-%d.distributor-cells:3337" .) -}}
{{- end -}}
{{- $_ := set $all "DISTRIBUTOR_PEERS__URLS" (toJson $urls) -}}
{{- $_ := set $all "DISTRIBUTOR_PEERS__PORT" "3337" -}}
{{- $_ := set $all "DISTRIBUTOR_PEERS__SECRET_FILE" "/etc/distributor-fleet/peers-secret" -}}
{{- $_ := set $all "DISTRIBUTOR_FETCH__CONCURRENCY" .Values.cells.concurrency -}}
{{- else -}}
{{- $_ := set $all "DISTRIBUTOR_ID" .Release.Name -}}
{{- $_ := set $all "DISTRIBUTOR_PUBLIC_API__FOLLOW_GROWING_FILES" "false" -}}
{{- $_ := set $all "DISTRIBUTOR_FETCH__CONCURRENCY" .Values.fetcher.concurrency -}}
{{- end -}}
{{- range $name, $value := merge (dict) .Values.settings $all }}
{{ $name }}: {{ $value | toString | quote }}
{{- end }}
{{- end }}

{{/* A changed setting or manifest makes a new name, and so a rolling update. */}}
{{- define "distributor.settingsName" -}}
{{ ternary "distributor-fleet" "distributor" .Values.cells.enabled }}-settings-{{ include "distributor.settings" . | sha256sum | trunc 10 }}
{{- end }}

{{- define "distributor.manifestName" -}}
{{ ternary "distributor-fleet" "distributor" .Values.cells.enabled }}-manifest-{{ .Values.manifest | sha256sum | trunc 10 }}
{{- end }}

{{- define "distributor.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "distributor.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "distributor.selector" . | nindent 8 }}
{{- end }}

{{- define "distributor.serverUrls" -}}
- name: DISTRIBUTOR_STATE_STORE__URL
  valueFrom: {secretKeyRef: {name: {{ .Values.serversSecret }}, key: state-store-url}}
- name: DISTRIBUTOR_JOB_QUEUE__URL
  valueFrom: {secretKeyRef: {name: {{ .Values.serversSecret }}, key: job-queue-url}}
{{- end }}

{{/* A container. `metrics`: the name of its port for metrics; `cell`: whether it is one of a cell's. */}}
{{- define "distributor.container" -}}
{{- $ports := dict "api" 9463 "fetcher" 9464 "evictor" 9465 -}}
- name: {{ .component }}
  image: {{ include "distributor.image" . }}
  args: [{{ .component }}]
  envFrom:
    - configMapRef: {name: {{ include "distributor.settingsName" .root }}}
  env:
    {{- if .cell }}
    - name: POD_NAME
      valueFrom: {fieldRef: {fieldPath: metadata.name}}
    - name: DISTRIBUTOR_ID
      value: $(POD_NAME)
    # Redis and RabbitMQ are shared by all cells, which keep apart by their prefixes.
    - name: DISTRIBUTOR_STATE_STORE__PREFIX
      value: "$(POD_NAME):"
    - name: DISTRIBUTOR_JOB_QUEUE__PREFIX
      value: $(POD_NAME)
    - name: DISTRIBUTOR_PEERS__OWN_URL
      value: http://$(POD_NAME).distributor-cells:3337
    {{- end }}
    {{- include "distributor.serverUrls" .root | nindent 4 }}
  ports:
    {{- if eq .component "api" }}
    - {name: http, containerPort: 3334}
    {{- if .cell }}
    - {name: peers, containerPort: 3337}
    {{- end }}
    {{- end }}
    - {name: {{ .metrics }}, containerPort: {{ get $ports .component }}}
  startupProbe:
    httpGet: {path: /healthz, port: {{ .metrics }}}
    periodSeconds: 2
    failureThreshold: 60
  livenessProbe:
    httpGet: {path: /healthz, port: {{ .metrics }}}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 3
  readinessProbe:
    httpGet: {path: /readyz, port: {{ .metrics }}}
    periodSeconds: 5
    timeoutSeconds: 5
    failureThreshold: 2
  {{- if eq .component "api" }}
  # Until every proxy knows that this pod is leaving, it goes on accepting.
  lifecycle:
    preStop: {exec: {command: [python3, -c, "import time; time.sleep(5)"]}}
  {{- end }}
  resources:
    {{- toYaml (get .root.Values .component).resources | nindent 4 }}
  securityContext:
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities: {drop: [ALL]}
  volumeMounts:
    {{- if eq .component "api" }}
    - {name: media, mountPath: /var/lib/distributor, readOnly: true}
    {{- else }}
    - {name: media, mountPath: /var/lib/distributor}
    {{- end }}
    - {name: manifest, mountPath: /etc/distributor, readOnly: true}
    {{- if .cell }}
    - {name: peers, mountPath: /etc/distributor-fleet, readOnly: true}
    {{- end }}
    - {name: temporary, mountPath: /tmp}
{{- end }}

{{- define "distributor.volumes" -}}
- name: manifest
  configMap: {name: {{ include "distributor.manifestName" . }}}
- name: temporary
  emptyDir: {medium: Memory, sizeLimit: 64Mi}
{{- end }}

{{/* One Deployment and its disruption budget. `spec` and `budget`: their own fields; `grace`: seconds that a stop may take. */}}
{{- define "distributor.deployment" -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: distributor-{{ .component }}
  labels:
    {{- include "distributor.labels" . | nindent 4 }}
spec:
  {{- .spec | nindent 2 }}
  selector:
    matchLabels:
      {{- include "distributor.selector" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "distributor.labels" . | nindent 8 }}
    spec:
      {{- if ne .component "fetcher" }}
      {{- include "distributor.spread" . | nindent 6 }}
      {{- end }}
      {{- include "distributor.podSecurity" . | nindent 6 }}
      terminationGracePeriodSeconds: {{ .grace }}
      containers:
        {{- include "distributor.container" (merge (dict "metrics" "metrics" "cell" false) .) | nindent 8 }}
      volumes:
        - name: media
          persistentVolumeClaim: {claimName: distributor-media}
        {{- include "distributor.volumes" .root | nindent 8 }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: distributor-{{ .component }}
  labels:
    {{- include "distributor.labels" . | nindent 4 }}
spec:
  {{ .budget }}
  selector:
    matchLabels:
      {{- include "distributor.selector" . | nindent 6 }}
{{- end }}
