{{/* Parts of every pod: security, volumes, environment, scheduling. */}}

{{- define "twostroke.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.securityContext.runAsUser }}
runAsGroup: {{ .Values.securityContext.fsGroup }}
fsGroup: {{ .Values.securityContext.fsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "twostroke.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  {{- with .capabilities }}
  add: {{ toJson . }}
  {{- end }}
{{- end }}

{{/* Environment of a process of the cluster. The key is read from the Secret by the kubelet; it is in no argument. */}}
{{- define "twostroke.env" -}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: TWOSTROKE__CLUSTER__KEY
  valueFrom:
    secretKeyRef: {name: {{ include "twostroke.clusterKeySecret" . }}, key: {{ .Values.clusterKey.secretKey }}}
{{- with .Values.apiKeys.secretName }}
- name: TWOSTROKE__ROUTER__API_KEYS
  valueFrom:
    secretKeyRef: {name: {{ . }}, key: {{ $.Values.apiKeys.secretKey }}}
{{- end }}
- {name: HOME, value: /tmp}
- {name: XDG_CACHE_HOME, value: /cache}
- {name: TRITON_CACHE_DIR, value: /cache/triton}
{{- end }}

{{/* The token of the pod's account, for our own container alone: no other one in the pod can use its rights. */}}
{{- define "twostroke.accountVolume" -}}
- name: account
  projected:
    defaultMode: 288 # 0440
    sources:
      - serviceAccountToken: {path: token, expirationSeconds: 3600}
      - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
      - downwardAPI: {items: [{path: namespace, fieldRef: {fieldPath: metadata.namespace}}]}
{{- end }}

{{- define "twostroke.accountMount" -}}
- {name: account, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}
{{- end }}

{{- define "twostroke.mounts" -}}
- {name: config, mountPath: /etc/twostroke, readOnly: true}
{{- if eq .Values.discovery.kind "endpointslices" }}
{{ include "twostroke.accountMount" . }}
{{- end }}
- {name: tmp, mountPath: /tmp}
- {name: cache, mountPath: /cache}
{{- include "twostroke.tlsMount" . }}
{{- include "twostroke.modelMount" . }}
{{- end }}

{{- define "twostroke.volumes" -}}
- name: config
  configMap: {name: {{ include "twostroke.fullname" . }}}
- name: tmp
  emptyDir: {}
- name: cache
  emptyDir: {}
{{- if eq .Values.discovery.kind "endpointslices" }}
{{ include "twostroke.accountVolume" . }}
{{- end }}
{{- include "twostroke.modelVolume" . }}
{{- end }}

{{/* Certificates of a pod, of the role router or worker. Give dict "root" $ "role" ROLE. */}}
{{- define "twostroke.tlsSecret" -}}
{{ default (printf "%s-%s-tls" (include "twostroke.fullname" .root) .role) (index .root.Values.tls (printf "%sSecretName" .role)) }}
{{- end }}

{{- define "twostroke.tlsVolume" -}}
{{- if .root.Values.tls.enabled }}
- name: tls
  secret: {secretName: {{ include "twostroke.tlsSecret" . }}, defaultMode: 288} # 0440
{{- end }}
{{- end }}

{{- define "twostroke.tlsMount" -}}
{{- if .Values.tls.enabled }}
- {name: tls, mountPath: /etc/twostroke-tls, readOnly: true}
{{- end }}
{{- end }}

{{/* Certificate of the routers that clients see, and the scheme that goes with it. */}}
{{- define "twostroke.publicTlsSecret" -}}
{{ default (printf "%s-public-tls" (include "twostroke.fullname" .)) .Values.router.tls.secretName }}
{{- end }}

{{- define "twostroke.scheme" -}}
{{ ternary "https" "http" .Values.router.tls.enabled }}
{{- end }}

{{/* Metadata of a pod. Give dict "root" $ "component" NAME "block" VALUES. */}}
{{- define "twostroke.podMetadata" -}}
labels:
  {{- include "twostroke.labels" . | nindent 2 }}
  {{- include "twostroke.llmdLabels" . | nindent 2 }}
  {{- with .block.podLabels }}{{ toYaml . | nindent 2 }}{{ end }}
annotations:
  checksum/config: {{ include "twostroke.config" .root | sha256sum }}
  {{- if and .root.Values.rdma.enabled .root.Values.rdma.networks (ne .component "router") }}
  k8s.v1.cni.cncf.io/networks: {{ .root.Values.rdma.networks | quote }}
  {{- end }}
  {{- with .block.podAnnotations }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}

{{/* Labels by which llm-d's endpoint picker finds model servers. */}}
{{- define "twostroke.llmdLabels" -}}
llm-d.ai/inference-serving: "true"
llm-d.ai/engine-type: twostroke
llm-d.ai/model: {{ (include "twostroke.model" .root | fromJson).name | replace "/" "-" | trunc 63 | trimAll "-._" }}
{{- if ne .component "router" }}
llm-d.ai/role: {{ ternary "both" .component (eq .component "combined") }}
llm-d.ai/accelerator-vendor: {{ .root.Values.accelerator.type }}
{{- end }}
{{- end }}

{{/* Where pods go. Give dict "root" $ "component" NAME "block" VALUES. */}}
{{- define "twostroke.scheduling" -}}
{{- range $key := list "nodeSelector" "tolerations" "topologySpreadConstraints" "priorityClassName" "schedulerName" "runtimeClassName" }}
{{- with index $.block $key }}
{{ $key }}: {{ toJson . }}
{{- end }}
{{- end }}
{{- if .block.affinity }}
affinity: {{ toJson .block.affinity }}
{{- else if and .root.Values.topology.keys (ne .component "router") }}
affinity:
  podAffinity: # to the other workers: the closest label weighs most
    preferredDuringSchedulingIgnoredDuringExecution:
      {{- range $index, $key := .root.Values.topology.keys }}
      - weight: {{ max 1 (sub 100 (mul 25 $index)) }}
        podAffinityTerm:
          topologyKey: {{ $key }}
          labelSelector:
            matchLabels:
              app.kubernetes.io/instance: {{ $.root.Release.Name }}
            matchExpressions:
              - {key: app.kubernetes.io/component, operator: In, values: [prefill, decode, combined]}
      {{- end }}
{{- end }}
{{- end }}

{{/* Fields of every pod's spec. */}}
{{- define "twostroke.podCommon" -}}
serviceAccountName: {{ include "twostroke.serviceAccount" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
securityContext:
  {{- include "twostroke.podSecurity" .root | nindent 2 }}
{{- include "twostroke.scheduling" . }}
{{- end }}
